"""The embedded pair: a miniature SDXL base and refiner, trained from nothing on drawn scenes, with its data
and its scorer.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdxl_trt.mini.pair import materialize

__all__ = ["materialize"]


def __getattr__(name: str) -> object:
    """Import `materialize` when it is first asked for, so that the scenes and the scorer stay free of its
    dependencies.
    """
    if name == "materialize":
        from sdxl_trt.mini.pair import materialize  # noqa: PLC0415 (see above)

        return materialize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
