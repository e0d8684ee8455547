"""From a body to a request: fields checked by name, sizes the bundle takes, the picture and the mask of an edit."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.openai.body.asked import (
        MOST_GUIDANCE, MOST_PARTIALS, MOST_PROMPT, Asked, NamedLora, Output, read_asked,
    )
    from sdxl_trt.server.openai.body.fields import invalid
    from sdxl_trt.server.openai.body.form import sorted_parts
    from sdxl_trt.server.openai.body.sizes import Sizes, told
    from sdxl_trt.server.openai.body.translation import DEFAULT_STRENGTH, Start, translate
else:
    __getattr__ = lazy_names(__name__, {
        "asked": ("MOST_GUIDANCE", "MOST_PARTIALS", "MOST_PROMPT", "Asked", "NamedLora", "Output", "read_asked"),
        "fields": ("invalid",),
        "form": ("sorted_parts",),
        "sizes": ("Sizes", "told"),
        "translation": ("DEFAULT_STRENGTH", "Start", "translate"),
    })

__all__ = [
    "DEFAULT_STRENGTH", "MOST_GUIDANCE", "MOST_PARTIALS", "MOST_PROMPT", "Asked", "NamedLora", "Output", "Sizes",
    "Start", "invalid", "read_asked", "sorted_parts", "told", "translate",
]
