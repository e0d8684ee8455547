"""Stable Diffusion XL's base and refiner as inference engines: export once, then generate without torch.

from sdxl_trt import Request, open_bundle

with open_bundle("my-bundle") as pipeline:
    for picture in pipeline.generate(Request("a red fox", steps=30, handoff=0.8, seed=7)):
        picture.save("fox.png")

Names are imported when they are first used: importing this package loads neither numpy nor torch.
"""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.engines import SdxlTrtError, build_plans
    from sdxl_trt.export import export_bundle
    from sdxl_trt.runtime import Picture, Pipeline, Request, Step, open_bundle

    __version__: str
else:
    __getattr__ = lazy_names(__name__, {
        "engines": ("SdxlTrtError", "build_plans"),
        "engines.host": ("__version__",),
        "export": ("export_bundle",),
        "runtime": ("Picture", "Pipeline", "Request", "Step", "open_bundle"),
    })

__all__ = [
    "Picture", "Pipeline", "Request", "SdxlTrtError", "Step", "__version__", "build_plans", "export_bundle",
    "open_bundle",
]
