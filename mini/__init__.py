"""The embedded pair: a miniature SDXL base and refiner trained from scratch on drawn scenes; their data and scorer."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdxl_trt.mini.clip_vocabulary import merges, vocabulary
    from sdxl_trt.mini.embedded import NOTE, bundle_path, lora_path
    from sdxl_trt.mini.pair import materialize

__all__ = ["NOTE", "bundle_path", "lora_path", "materialize", "merges", "vocabulary"]

_HOMES = {"merges": "clip_vocabulary", "vocabulary": "clip_vocabulary", "materialize": "pair"}


def __getattr__(name: str) -> object:
    """Import a name on first use: the runtime needs only the paths."""
    from importlib import import_module  # noqa: PLC0415

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'embedded')}"), name)
