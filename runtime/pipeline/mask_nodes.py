"""Masks and canvases as ComfyUI's nodes make them, in float32: masks (h, w) from 0 to 1, pixels (1, 3, h, w).

Sources: ``nodes.py`` and ``comfy_extras/nodes_mask.py`` of ComfyUI. Nothing is written in place.
"""

__all__ = ["canvas", "canvas_mask", "cropped_mask", "feathered", "greyed", "grown", "scaled_mask", "widened"]

from functools import reduce

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.runtime.images import Margins, resize

Mask = NDArray[np.float32]
Pixels = NDArray[np.float32]
Size = tuple[int, int]
GREY = np.float32(0.5)


def scaled_mask(mask: Mask, size: Size) -> Mask:
    """Return `mask` scaled to `size` (height, width), bilinearly and without antialiasing."""
    return mask if mask.shape == size else resize(mask[None, None], size, "bilinear")[0, 0]


def cropped_mask(mask: Mask, factor: int) -> Mask:
    """Return the centre of `mask` with sides that are multiples of `factor`, as pictures are cut before encoding."""
    high, wide = (side // factor * factor for side in mask.shape)
    top, left = (mask.shape[0] % factor) // 2, (mask.shape[1] % factor) // 2
    return mask[top : top + high, left : left + wide]


def greyed(pixels: Pixels, mask: Mask) -> Pixels:
    """Return `pixels` that are grey where `mask`, of their size, rounds to 1."""
    kept = np.float32(1.0) - np.rint(mask)
    return (pixels - GREY) * kept + GREY


def widened(mask: Mask, by: int) -> Mask:
    """Return `mask`, rounded to 0 or 1, widened by a square of `by` pixels (VAEEncodeForInpaint's grow_mask_by)."""
    rounded = np.rint(mask)
    if not by:
        return rounded
    before = -(-(by - 1) // 2)
    padded = np.pad(rounded, before)
    for axis in (0, 1):
        length = padded.shape[axis] - by + 1
        padded = reduce(np.maximum, (padded.take(range(shift, shift + length), axis) for shift in range(by)))
    return padded[: mask.shape[0], : mask.shape[1]]


def grown(mask: Mask, by: int, *, tapered: bool) -> Mask:
    """Return `mask` grown by `by` pixels, or shrunk if negative: the extreme of each pixel's neighbours, `by` times.

    `tapered` leaves the four diagonal neighbours out.
    """
    extreme = np.maximum if by > 0 else np.minimum
    left, reach = min(abs(by), sum(mask.shape)), 0
    while left:
        # The extremes within `reach` of pixels that are `reach` apart leave no gap: few steps go any distance.
        span = min(left, max(reach, 1))
        if tapered:
            sides = [_moved(mask, each, axis) for axis in (0, 1) for each in (-span, span)]
            mask = reduce(extreme, sides, mask)
        else:
            for axis in (0, 1):
                mask = extreme(extreme(_moved(mask, -span, axis), _moved(mask, span, axis)), mask)
        left, reach = left - span, reach + span
    return mask


def _moved(mask: Mask, by: int, axis: int) -> Mask:
    """Return the values `by` pixels further along `axis`, those of the edge beyond it."""
    last = mask.shape[axis] - 1
    moved: Mask = mask.take(np.clip(np.arange(last + 1) + by, 0, last), axis)
    return moved


def feathered(mask: Mask, margins: Margins) -> Mask:
    """Return `mask` that falls linearly toward its left, top, right and bottom edge over `margins` pixels."""
    left, top, right, bottom = margins
    high, wide = mask.shape
    across, down = _ramp(left, wide) * _ramp(right, wide)[::-1], _ramp(top, high) * _ramp(bottom, high)[::-1]
    result: Mask = mask * across * down[:, None]
    return result


def _ramp(length: int, size: int) -> Mask:
    length = min(length, size)
    ramp = np.ones(size, np.float32)
    ramp[:length] = np.arange(1, length + 1) / max(length, 1)
    return ramp


def canvas(pixels: Pixels, margins: Margins) -> Pixels:
    """Return `pixels` with grey `margins` (left, top, right, bottom)."""
    left, top, right, bottom = margins
    return np.pad(pixels, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=GREY)


def canvas_mask(size: Size, margins: Margins, feathering: int) -> Mask:
    """Return the mask of a canvas around a picture of `size` (height, width): white `margins` that fade into it."""
    left, top, right, bottom = margins
    high, wide = size
    inner = np.zeros(size, np.float32)
    if feathering > 0 and feathering * 2 < min(size):
        # A side without a margin counts as far away: at the whole size of the picture.
        down = np.minimum(_distances(high, near=top > 0), _distances(high, near=bottom > 0, back=True))
        across = np.minimum(_distances(wide, near=left > 0), _distances(wide, near=right > 0, back=True))
        distance = np.minimum(np.minimum(down[:, None], across), feathering)
        inner = (((feathering - distance) / feathering) ** 2).astype(np.float32)
    return np.pad(inner, ((top, bottom), (left, right)), constant_values=np.float32(1.0))


def _distances(size: int, *, near: bool, back: bool = False) -> NDArray[np.int64]:
    places = np.arange(size)
    return np.full(size, size) if not near else size - places if back else places
