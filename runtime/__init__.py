"""Prompt to picture without torch: numpy on the host, engines for the graphs.

from sdxl_trt.runtime import Request, open_bundle

with open_bundle("my-bundle") as pipeline:
    for picture in pipeline.generate(Request("a red fox", steps=30, handoff=0.8, seed=7)):
        picture.save("fox.png")
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdxl_trt.runtime.images.picture import Picture
    from sdxl_trt.runtime.pipeline.pipeline import Pipeline, open_bundle
    from sdxl_trt.runtime.pipeline.run import Step
    from sdxl_trt.runtime.request.request import Request

__all__ = ["Picture", "Pipeline", "Request", "Step", "open_bundle"]

_HOMES = {
    "Picture": "images.picture",
    "Pipeline": "pipeline.pipeline",
    "Request": "request.request",
    "Step": "pipeline.run",
    "open_bundle": "pipeline.pipeline",
}


def __getattr__(name: str) -> object:
    """Import on first use, so that `trt-generate --help` waits for nothing."""
    from importlib import import_module  # noqa: PLC0415

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
