"""The size of the pictures: what is asked for, or usual, within what the UNets and the plans take."""

__all__ = ["MAX_SIDE", "picture_size"]

import math

from sdxl_trt.engines.errors import SizeError
from sdxl_trt.engines.manifest import Manifest
from sdxl_trt.engines.plans import Limits

MAX_SIDE = 16384


def picture_size(
    asked: tuple[int | None, int | None],
    latents: tuple[int, ...] | None,
    manifest: Manifest,
    limits: Limits | None,
    *,
    refined: bool,
) -> tuple[int, int]:
    """Return (height, width) in pixels: as `asked`, else those of `latents` of this shape, else the usual ones.

    Raises SizeError, which names the nearest sizes that would do.
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
    height, width = (side if stated is None else stated for side, stated in zip((height, width), asked, strict=True))
    for option, side in (("--width", width), ("--height", height)):
        _check_side(option, side, multiple)
    if limits is not None:
        limits.check(width, height)
    return height, width


def _check_side(option: str, side: int, multiple: int) -> None:
    if side % multiple or not 0 < side <= MAX_SIDE:
        below = min(max(side // multiple, 1) * multiple, MAX_SIDE // multiple * multiple)
        above = min(below + multiple, MAX_SIDE // multiple * multiple)
        near = f"{below}" if side < multiple or below == above else f"{below} or {above}"
        raise SizeError(f"{option} {side}: the UNets in use take multiples of {multiple}; try {near}")
