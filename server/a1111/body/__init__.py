"""What bodies of A1111's API ask for: fields, prompts, samplers, models and options, checked without drawing."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.a1111.body.asked import Asked, AskedControl, AskedMask, AskedStart, echo, read_asked
    from sdxl_trt.server.a1111.body.fields import Fields, invalid
    from sdxl_trt.server.a1111.body.models import ENDING, Model, Models, embeddings_told, loras_told, names_in
    from sdxl_trt.server.a1111.body.prompts import Prompt, read_prompt
    from sdxl_trt.server.a1111.body.samplers import SAMPLERS, SCHEDULERS, choose
    from sdxl_trt.server.a1111.body.settings import Settings, changed, options_told
else:
    __getattr__ = lazy_names(__name__, {
        "asked": ("Asked", "AskedControl", "AskedMask", "AskedStart", "echo", "read_asked"),
        "fields": ("Fields", "invalid"),
        "models": ("ENDING", "Model", "Models", "embeddings_told", "loras_told", "names_in"),
        "prompts": ("Prompt", "read_prompt"),
        "samplers": ("SAMPLERS", "SCHEDULERS", "choose"),
        "settings": ("Settings", "changed", "options_told"),
    })

__all__ = [
    "ENDING", "SAMPLERS", "SCHEDULERS", "Asked", "AskedControl", "AskedMask", "AskedStart", "Fields", "Model",
    "Models", "Prompt", "Settings", "changed", "choose", "echo", "embeddings_told", "invalid", "loras_told",
    "names_in", "options_told", "read_asked", "read_prompt",
]
