"""The registry of samplers: each is a function of (x, sigmas) that asks for the model's estimates.

A sampler yields the latents after every step; progress, previews, timing and cancellation belong to the caller. While
it runs, nobody else may write to the arrays it uses: the initial latents, the model's estimates, the noise it draws and
the latents it yields, which it continues from. A caller that keeps or changes latents takes a copy. Latents keep their
shape and dtype, float32.
"""

__all__ = [
    "BROWNIAN",
    "COMFYUI",
    "COMFYUI_STOCHASTIC",
    "FEW_STEPS",
    "SAMPLERS",
    "STOCHASTIC",
    "TWO_CALLS",
    "Ask",
    "Asking",
    "Denoise",
    "Noise",
    "Sampler",
    "StochasticSampler",
    "bind_sampler",
    "brownian_span",
    "drive",
    "euler",
    "sampler_names",
]

from functools import partial

from sdxl_trt.engines import UsageError
from sdxl_trt.runtime.diffusion.samplers.adams import FEW_STEPS, deis, deis_comfyui, lms, lms_comfyui
from sdxl_trt.runtime.diffusion.samplers.base import (
    Ask,
    Asking,
    Denoise,
    Noise,
    Sampler,
    Sigmas,
    StochasticSampler,
    drive,
)
from sdxl_trt.runtime.diffusion.samplers.float32 import ancestral32, half_way, half_way_down
from sdxl_trt.runtime.diffusion.samplers.ode import ddim, dpm_2, dpmpp_2m, euler, heun, res_multistep
from sdxl_trt.runtime.diffusion.samplers.sde import (
    dpm_2_ancestral,
    dpmpp_2m_sde,
    dpmpp_2s_ancestral,
    dpmpp_3m_sde,
    dpmpp_sde,
    euler_ancestral,
    lcm,
)
from sdxl_trt.runtime.diffusion.samplers.unipc import uni_pc, uni_pc_bh1_comfyui, uni_pc_bh2_comfyui

SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "heun": heun,
    "dpm_2": dpm_2,
    "lms": lms,
    "dpmpp_2m": dpmpp_2m,
    "ddim": ddim,
    "uni_pc": uni_pc,
    "deis": deis,
    "res_multistep": res_multistep,
}
STOCHASTIC: dict[str, StochasticSampler] = {
    "euler_ancestral": euler_ancestral,
    "dpm_2_ancestral": dpm_2_ancestral,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "lcm": lcm,
}
COMFYUI: dict[str, Sampler] = {
    "dpm_2": partial(dpm_2, middle=half_way),
    "lms": lms_comfyui,
    "uni_pc": uni_pc_bh1_comfyui,
    "uni_pc_bh2": uni_pc_bh2_comfyui,
    "deis": deis_comfyui,
}
"""ComfyUI's versions of samplers that differ from diffusers', even if only in rounding; so are the next ones."""
COMFYUI_STOCHASTIC: dict[str, StochasticSampler] = STOCHASTIC | {
    "euler_ancestral": partial(euler_ancestral, split=ancestral32),
    "dpm_2_ancestral": partial(dpm_2_ancestral, split=ancestral32, middle=half_way),
    "dpmpp_2s_ancestral": partial(dpmpp_2s_ancestral, split=ancestral32, middle=half_way_down),
    "dpmpp_sde": partial(dpmpp_sde, split=ancestral32, middle=half_way_down),
}

TWO_CALLS = frozenset({"heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"})
"""Samplers that ask the model twice in every step except one to sigma 0."""

BROWNIAN = frozenset({"dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"})
"""Samplers that draw their noise from one Brownian path; in diffusers only the first one does."""


def sampler_names(*, comfyui: bool = False) -> list[str]:
    """Return the names that `bind_sampler` accepts."""
    return list(dict.fromkeys([*SAMPLERS, *STOCHASTIC, *(COMFYUI if comfyui else ())]))


def brownian_span(name: str, sigmas: Sigmas, grid: Sigmas, *, comfyui: bool) -> tuple[float, float] | None:
    """Return the lowest and highest sigma of the Brownian path of sampler `name` for its part `sigmas` of `grid`.

    None for independent noise. In ComfyUI the path covers the sampler's part, in diffusers the whole grid.
    """
    if name not in (BROWNIAN if comfyui else {"dpmpp_sde"}):
        return None
    way = sigmas if comfyui else grid
    positive = way[way > 0.0]
    return float(positive.min()), float(positive.max())


def bind_sampler(name: str, noise: Noise, *, comfyui: bool = False, short_end: bool | None = None) -> Sampler:
    """Return the sampler `name` as a function of (x, sigmas), for `drive`; a stochastic one draws from `noise`.

    With `comfyui`, ComfyUI's version of it. `short_end` is the option of `deis`, for sigmas that are a part of a grid.
    Raises UsageError for an unknown name.
    """
    if comfyui and name in COMFYUI:
        return COMFYUI[name]
    if name == "deis":
        return partial(deis, short_end=short_end)
    if name in SAMPLERS:
        return SAMPLERS[name]
    if name in STOCHASTIC:
        return partial((COMFYUI_STOCHASTIC if comfyui else STOCHASTIC)[name], noise=noise)
    raise UsageError(f"unknown sampler {name!r}; choose one of: {', '.join(sampler_names(comfyui=comfyui))}")
