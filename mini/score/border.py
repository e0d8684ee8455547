"""Measure the white border of a sticker, with numpy alone."""

__all__ = ["border_width"]

import numpy as np

from sdxl_trt.mini.scenes import COLOURS, STICKER_BORDER, Picture, read_caption
from sdxl_trt.mini.score.reading import distance_to_tones, eroded, largest_part, read, spread, tones

REACH = round(STICKER_BORDER) + 3
"""How far from the shape, in pixels, white belongs to the border."""


def border_width(picture: Picture, caption: str) -> float:
    """The mean width in pixels of the white border around the shape of a `(128, 128, 3)` uint8 picture.

    The shape is where `read` sees it, the colours are those of `caption`; 0 if there is no shape. Raises `ValueError`
    for a caption with white, beside which a white border is invisible, and for one that `read_caption` cannot parse.
    """
    asked = read_caption(caption)
    if "white" in (asked.colour, asked.background):
        raise ValueError(f"{caption!r} has white, beside which a white border is invisible; use other colours")
    pixels = picture.astype(np.float32)
    front, back = (distance_to_tones(pixels, tones(name)) for name in (asked.colour, asked.background))
    from_white = np.linalg.norm(pixels - np.asarray(COLOURS["white"], np.float32), axis=-1)
    seen = read(picture).mask
    white = from_white < np.minimum(front, back)
    # `read` may take the border for a part of the shape.
    shape = largest_part(seen & (front < np.minimum(from_white, back)))
    near = seen
    for _ in range(REACH):
        near = spread(near)
    outline = int((shape & ~eroded(shape, 1)).sum())
    return float((white & near).sum() / outline) if outline else 0.0
