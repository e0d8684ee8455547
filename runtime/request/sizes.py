"""The size of the pictures: as requested, or the default, within what the UNets and the plans accept."""

__all__ = ["MAX_SIDE", "picture_size"]

import logging
import math

from sdxl_trt.engines import SizeError
from sdxl_trt.engines.bundle import Manifest
from sdxl_trt.engines.plans import PlanLimits
from sdxl_trt.runtime.images import Margins
from sdxl_trt.runtime.request.masking import canvas_margins

log = logging.getLogger("sdxl_trt.runtime")
MAX_SIDE = 16384
SMALLEST = 8
"""diffusers and ComfyUI round a picture's sides to multiples of this."""
LARGE = 4
"""A picture of more than this many times the default area is warned of."""


def picture_size(
    asked: tuple[int | None, int | None],
    latents: tuple[int, ...] | None,
    manifest: Manifest,
    limits: PlanLimits | None,
    *,
    refined: bool,
    picture: tuple[int, int] | None = None,
    outpaint: Margins = (0, 0, 0, 0),
) -> tuple[int, int]:
    """Return (height, width) in pixels: as `asked`, else those of `latents` of this shape, else the default.

    A `picture` of this size keeps its own, rounded down to the multiple that the UNets accept; if one side is
    requested, the other keeps the aspect ratio. A canvas with the margins `outpaint` must be a multiple, since the
    margins were asked for in pixels. Raises SizeError, which names the nearest valid sizes.
    """
    base = manifest.base
    multiple = base.size_multiple
    if refined and manifest.refiner is not None:
        multiple = math.lcm(multiple, manifest.refiner.size_multiple)
    factor = base.vae.factor
    usual = max(base.sample_size * factor // multiple, 1) * multiple
    height, width = (usual, usual) if limits is None else (limits.height.opt, limits.width.opt)
    if latents is not None and len(latents) == 4:
        height, width = (side * factor for side in latents[2:])
    elif picture is not None:
        if any(outpaint) and asked == (None, None):
            _check_canvas(picture, outpaint, multiple)
        height, width = _of_picture(picture, asked, multiple)
        if asked == (None, None) and height * width > LARGE * usual**2:
            log.warning("a picture of %dx%d is far larger than the %dx%d that the model was trained on; --width or"
                        " --height would make it smaller", width, height, usual, usual)  # fmt: skip
    height, width = (side if stated is None else stated for side, stated in zip((height, width), asked, strict=True))
    for option, side in (("--width", width), ("--height", height)):
        _check_side(option, side, multiple)
    if limits is not None:
        limits.check(width, height)
    return height, width


def _check_canvas(size: tuple[int, int], outpaint: Margins, multiple: int) -> None:
    if any(side % multiple for side in size):
        margins, fitting = ",".join(map(str, outpaint)), canvas_margins(size, outpaint, multiple)
        raise SizeError(f"--outpaint {margins}: makes a picture of {size[1]}x{size[0]}, but the UNets in use take"
                        f" multiples of {multiple}; try --outpaint {fitting}")  # fmt: skip


def _check_side(option: str, side: int, multiple: int) -> None:
    if side % multiple or not 0 < side <= MAX_SIDE:
        below = min(max(side // multiple, 1) * multiple, MAX_SIDE // multiple * multiple)
        above = min(below + multiple, MAX_SIDE // multiple * multiple)
        near = f"{below}" if side < multiple or below == above else f"{below} or {above}"
        raise SizeError(f"{option} {side}: the UNets in use take multiples of {multiple}; try {near}")


def _of_picture(size: tuple[int, int], asked: tuple[int | None, int | None], multiple: int) -> tuple[int, int]:
    """Return the sides for a picture of `size`, in multiples; with its aspect ratio if one side is `asked`."""
    height, width = size
    if asked == (None, None):
        down = height // multiple * multiple, width // multiple * multiple
        if any(side // SMALLEST * SMALLEST != kept for side, kept in zip(size, down, strict=True)) and all(down):
            log.warning("the picture of %dx%d is taken in %dx%d: the UNets in use take multiples of %d", width, height,
                        down[1], down[0], multiple)  # fmt: skip
        if not all(down):
            raise SizeError(f"a picture of {width}x{height} pixels is smaller than the {multiple} that the UNets in use"
                            f" take; give --width and --height, multiples of {multiple}")  # fmt: skip
        return down
    across, up = asked[1] or width, asked[0] or height
    shaped = height * across / width, width * up / height
    return tuple(max(round(side / multiple), 1) * multiple for side in shaped)  # type: ignore[return-value]
