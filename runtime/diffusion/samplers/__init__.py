"""Samplers: one generator each, which asks for the model's estimates and yields latents."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.runtime.diffusion.samplers.adams import FEW_STEPS
    from sdxl_trt.runtime.diffusion.samplers.base import Ask, Asking, Denoise, Noise, Sampler, drive
    from sdxl_trt.runtime.diffusion.samplers.registry import (
        BROWNIAN, STOCHASTIC, TWO_CALLS, bind_sampler, brownian_span, sampler_names,
    )
else:
    __getattr__ = lazy_names(__name__, {
        "adams": ("FEW_STEPS",),
        "base": ("Ask", "Asking", "Denoise", "Noise", "Sampler", "drive"),
        "registry": ("BROWNIAN", "STOCHASTIC", "TWO_CALLS", "bind_sampler", "brownian_span", "sampler_names"),
    })

__all__ = [
    "BROWNIAN", "FEW_STEPS", "STOCHASTIC", "TWO_CALLS", "Ask", "Asking", "Denoise", "Noise", "Sampler",
    "bind_sampler", "brownian_span", "drive", "sampler_names",
]
