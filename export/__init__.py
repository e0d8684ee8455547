"""SDXL checkpoints to ONNX bundles: the only home of torch, diffusers and transformers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdxl_trt.export.components import Options
    from sdxl_trt.export.exporter import export_bundle

__all__ = ["Options", "export_bundle"]


def __getattr__(name: str) -> object:
    """Import on first use: torch takes seconds, and `export-engines --help` must not wait for it."""
    from importlib import import_module  # noqa: PLC0415

    homes = {"Options": "components", "export_bundle": "exporter"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{homes[name]}"), name)
