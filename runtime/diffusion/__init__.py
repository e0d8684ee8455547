"""The mathematics of denoising: model evaluations, guidance and conditioning."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.runtime.diffusion.conditioning import Conditions, MicroConditions, make_conditions
    from sdxl_trt.runtime.diffusion.controls import ControlNets, ControlPart, comfyui_span, fraction_span
    from sdxl_trt.runtime.diffusion.denoiser import PREDICTIONS, Denoiser, Estimator, in_float32, read_only
    from sdxl_trt.runtime.diffusion.guidance import Guidance, guided_span
    from sdxl_trt.runtime.diffusion.inpaint import Inpaint, Keeper, NoiseMask
    from sdxl_trt.runtime.diffusion.step_cache import CachePolicy, StepCache, reach_of
else:
    __getattr__ = lazy_names(__name__, {
        "conditioning": ("Conditions", "MicroConditions", "make_conditions"),
        "controls": ("ControlNets", "ControlPart", "comfyui_span", "fraction_span"),
        "denoiser": ("PREDICTIONS", "Denoiser", "Estimator", "in_float32", "read_only"),
        "guidance": ("Guidance", "guided_span"),
        "inpaint": ("Inpaint", "Keeper", "NoiseMask"),
        "step_cache": ("CachePolicy", "StepCache", "reach_of"),
    })

__all__ = [
    "PREDICTIONS", "CachePolicy", "Conditions", "ControlNets", "ControlPart", "Denoiser", "Estimator", "Guidance",
    "Inpaint", "Keeper", "MicroConditions", "NoiseMask", "StepCache", "comfyui_span", "fraction_span", "guided_span",
    "in_float32", "make_conditions", "reach_of", "read_only",
]
