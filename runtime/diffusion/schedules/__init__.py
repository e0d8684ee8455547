"""Noise schedules: diffusers' and ComfyUI's."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.runtime.diffusion.schedules.comfyui import COMFYUI_SCHEDULES, DISCARDING
    from sdxl_trt.runtime.diffusion.schedules.diffusers import SPACINGS, TRANSFORMS
    from sdxl_trt.runtime.diffusion.schedules.schedule import Schedule, make_comfyui_schedule, make_schedule
    from sdxl_trt.runtime.diffusion.schedules.training import Table, comfyui_training_sigmas
else:
    __getattr__ = lazy_names(__name__, {
        "comfyui": ("COMFYUI_SCHEDULES", "DISCARDING"),
        "diffusers": ("SPACINGS", "TRANSFORMS"),
        "schedule": ("Schedule", "make_comfyui_schedule", "make_schedule"),
        "training": ("Table", "comfyui_training_sigmas"),
    })

__all__ = [
    "COMFYUI_SCHEDULES", "DISCARDING", "SPACINGS", "TRANSFORMS", "Schedule", "Table", "comfyui_training_sigmas",
    "make_comfyui_schedule", "make_schedule",
]
