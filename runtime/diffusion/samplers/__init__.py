"""Samplers: one function each, from sigmas to latents."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.runtime.diffusion.samplers.adams import FEW_STEPS
    from sdxl_trt.runtime.diffusion.samplers.base import Denoise, Noise, Sampler
    from sdxl_trt.runtime.diffusion.samplers.registry import (
        BROWNIAN, TWO_CALLS, bind_sampler, brownian_span, sampler_names,
    )
else:
    __getattr__ = lazy_names(__name__, {
        "adams": ("FEW_STEPS",),
        "base": ("Denoise", "Noise", "Sampler"),
        "registry": ("BROWNIAN", "TWO_CALLS", "bind_sampler", "brownian_span", "sampler_names"),
    })

__all__ = [
    "BROWNIAN", "FEW_STEPS", "TWO_CALLS", "Denoise", "Noise", "Sampler", "bind_sampler", "brownian_span",
    "sampler_names",
]
