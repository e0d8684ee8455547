"""From a body to a request: fields checked by name, sizes the bundle takes, the picture and the mask of an edit."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.openai.body.asked import Asked, NamedLora, Output, read_asked
    from sdxl_trt.server.openai.body.fields import invalid
    from sdxl_trt.server.openai.body.form import sorted_parts
    from sdxl_trt.server.openai.body.sizes import Sizes
    from sdxl_trt.server.openai.body.translation import Start, translate
else:
    __getattr__ = lazy_names(__name__, {
        "asked": ("Asked", "NamedLora", "Output", "read_asked"),
        "fields": ("invalid",),
        "form": ("sorted_parts",),
        "sizes": ("Sizes",),
        "translation": ("Start", "translate"),
    })

__all__ = ["Asked", "NamedLora", "Output", "Sizes", "Start", "invalid", "read_asked", "sorted_parts", "translate"]
