"""Prompt to picture without torch: numpy on the host, engines for the graphs.

from sdxl_trt.runtime import Request, open_bundle

with open_bundle("my-bundle") as pipeline:
    for picture in pipeline.generate(Request("a red fox", steps=30, handoff=0.8, seed=7)):
        picture.save("fox.png")
"""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.runtime.images import Picture, contact_sheet
    from sdxl_trt.runtime.pipeline import Batch, Pipeline, Shared, Step, open_bundle, share_key
    from sdxl_trt.runtime.presets import PRESETS
    from sdxl_trt.runtime.request import Request
else:
    __getattr__ = lazy_names(__name__, {
        "images": ("Picture", "contact_sheet"),
        "pipeline": ("Batch", "Pipeline", "Shared", "Step", "open_bundle", "share_key"),
        "presets": ("PRESETS",),
        "request": ("Request",),
    })

__all__ = [
    "PRESETS", "Batch", "Picture", "Pipeline", "Request", "Shared", "Step", "contact_sheet", "open_bundle", "share_key",
]
