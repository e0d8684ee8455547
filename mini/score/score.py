"""Score a picture: does it match its caption, how sharp is it, how damaged. Deterministic, numpy only."""

__all__ = ["Score", "score_picture"]

from dataclasses import dataclass

import numpy as np

from sdxl_trt.mini.scenes import (
    COLOURS,
    FILL_CONTRAST,
    SIDE,
    TEXTURE_CONTRAST,
    Asked,
    Picture,
    Plane,
    read_caption,
    shade,
)
from sdxl_trt.mini.score.reading import UNKNOWN, Mask, Reading, distance_to_tones, eroded, read, spread, tones

RIM = 4
"""Half width in pixels of the band around the shape's edge where sharpness is measured, but not colour errors."""
CRISP_WIDTH = 0.75
"""Width in pixels of an antialiased edge without blur."""
WORST_ERROR = 40.0


@dataclass(frozen=True)
class Score:
    """One picture against one caption.

    shape, colour, background, size, position: whether each matches the caption (True if the caption leaves it open);
    sharpness: 1 for a crisp edge, lower for a wider one; colour_error: root mean square distance in RGB (0..441) of
    the surfaces from the clean tones of the colours read; damage: 0 (none) to 1, from both.
    """

    reading: Reading
    shape: bool
    colour: bool
    background: bool
    size: bool
    position: bool
    sharpness: float
    colour_error: float
    damage: float

    @property
    def right(self) -> bool:
        """Whether the shape, its colour and the background all match the caption."""
        return self.shape and self.colour and self.background


def score_picture(picture: Picture, caption: str) -> Score:
    """Score a `(128, 128, 3)` uint8 picture. Raises `ValueError` for a caption that `read_caption` cannot parse."""
    asked = read_caption(caption)
    seen = read(picture)
    sharpness, error = edge_sharpness(picture, seen), surface_error(picture, seen)
    return Score(
        seen,
        seen.shape == asked.shape,
        seen.colour == asked.colour,
        seen.background == asked.background,
        asked.size in ("", size_of(seen)),
        position_fits(seen, asked),
        sharpness,
        error,
        damage_of(sharpness, error),
    )


def size_of(seen: Reading) -> str:
    """The size word for a reading's radius; the limits lie between the radii of the data set."""
    return "small" if seen.radius < 26 else "medium" if seen.radius < 37 else "large"


def position_fits(seen: Reading, asked: Asked) -> bool:
    """Whether the shape is off-centre in exactly the directions asked for. Large shapes have little room to move."""
    if not asked.position:
        return True
    if seen.shape == UNKNOWN:
        return False
    least = min(8.0, 0.5 * (SIDE / 2 - 1.05 * seen.radius - 6))
    words = asked.position.split()
    across, down = (int(abs(away) > least) * int(np.sign(away)) for away in (seen.x - SIDE / 2, seen.y - SIDE / 2))
    wanted = (("right" in words) - ("left" in words), ("bottom" in words) - ("top" in words))
    return (across, down) == wanted


def edge_sharpness(picture: Picture, seen: Reading) -> float:
    """1 for a crisp edge, 1/2 for one a pixel wider; 0 if a colour is unknown."""
    if UNKNOWN in (seen.colour, seen.background):
        return 0.0
    pixels = picture.astype(np.float32)
    back, front = (distance_to_tones(pixels, tones(name)) for name in (seen.background, seen.colour))
    share = back / np.maximum(back + front, 1e-6)
    # Slightly wrong surface colours are not blur: only pixels clearly between the two sides count.
    share = np.clip((share - 0.15) / 0.7, 0, 1)
    rim = band(seen.mask)
    length = float((seen.mask & ~eroded(seen.mask, 1)).sum())
    width = float((4 * share * (1 - share))[rim].sum()) / max(length, 1.0)
    return 1 / (1 + max(0.0, width - CRISP_WIDTH))


def band(mask: Mask) -> Mask:
    """The pixels within `RIM` of a mask's edge."""
    wide = mask
    for _ in range(RIM):
        wide = spread(wide)
    return wide & ~eroded(mask, RIM)


def surface_error(picture: Picture, seen: Reading) -> float:
    """Root mean square distance in RGB of pixels outside the band from the nearest clean tone of their side."""
    if UNKNOWN in (seen.colour, seen.background):
        return WORST_ERROR
    pixels = picture.astype(np.float32)
    back = tone_error(pixels, seen.background, TEXTURE_CONTRAST)
    front = tone_error(pixels, seen.colour, FILL_CONTRAST)
    surface = ~band(seen.mask)
    return float(np.sqrt(np.mean(np.where(seen.mask, front, back)[surface] ** 2)))


def tone_error(pixels: Plane, colour: str, contrast: float) -> Plane:
    """Distance in RGB from a colour or its second tone, whichever is nearer."""
    first = np.asarray(COLOURS[colour], np.float32)
    ends = (first, shade(colour, contrast))
    nearest: Plane = np.min([np.linalg.norm(pixels - end, axis=-1) for end in ends], axis=0)
    return nearest


def damage_of(sharpness: float, error: float) -> float:
    """0 to 1: the worse of soft edges and wrong surface colours, plus a quarter of the other."""
    parts = sorted((1 - sharpness, min(1.0, error / WORST_ERROR)))
    return min(1.0, parts[1] + 0.25 * parts[0])
