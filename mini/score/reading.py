"""What a picture shows, with numpy alone: its colours, the shape's location, and which of the six shapes it is."""

__all__ = ["UNKNOWN", "Mask", "Reading", "distance_to_tones", "eroded", "largest_part", "read", "spread", "tones"]

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from sdxl_trt.mini.scenes import COLOURS, FILL_CONTRAST, SHAPES, SIDE, Picture, Plane, extent, shade, shape_mask

Mask = npt.NDArray[np.bool_]

UNKNOWN = "unknown"
FRAME = 4
"""Width in pixels of the border that shows only the background (scenes keep a wider margin)."""
MAX_COLOUR_DISTANCE = 45.0
MIN_CONTRAST = 48.0
MIN_AREA = 0.012
MIN_OVERLAP = 0.70
MAX_OVERLAP = 0.76
WOBBLE = 2.0
"""A shape may miss its ideal by this many pixels along its whole outline, which costs thin and small shapes more
overlap than others; the resulting threshold is clipped to the two limits.
"""
MIN_LEAD = 0.02
"""A shape must overlap its best template better than every other shape's by this much."""
ALONE_OVERLAP = 0.66
ALONE_LEAD = 0.15
"""A lower overlap suffices for a shape that is unlike any other, such as a star with a long arm."""
_GRID = 48


@dataclass(frozen=True)
class Reading:
    """Shape, its colour and the background's (or "unknown"); overlap 0..1 with the ideal shape; centre and radius."""

    shape: str
    colour: str
    background: str
    overlap: float
    x: float
    y: float
    radius: float
    mask: Mask


def tones(colour: str) -> Plane:
    """The two ends `(2, 3)` of the line in RGB on which a colour's fills and textures lie."""
    return np.stack([np.asarray(COLOURS[colour], np.float32), shade(colour, FILL_CONTRAST)])


def distance_to_tones(pixels: npt.NDArray[np.floating], ends: Plane) -> Plane:
    """Distance `(...)` in RGB of pixels `(..., 3)` from the segment between two tones."""
    start, along = ends[0], ends[1] - ends[0]
    share = np.clip((pixels - start) @ along / (along @ along), 0, 1)
    away: Plane = np.linalg.norm(pixels - start - share[..., None] * along, axis=-1).astype(np.float32)
    return away


def name_colour(rgb: npt.NDArray[np.floating]) -> str:
    """The colour with the tones nearest to a `(3,)` RGB value, or "unknown" if none is near."""
    # A fill's second tone covers at most about half of a shape, so the mean lies in the first half of the line.
    halves = {name: np.stack([tones(name)[0], tones(name).mean(axis=0)]) for name in COLOURS}
    distances = {name: float(distance_to_tones(rgb, ends)) for name, ends in halves.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] <= MAX_COLOUR_DISTANCE else UNKNOWN


def read(picture: Picture) -> Reading:
    """Read a `(128, 128, 3)` uint8 picture."""
    pixels = picture.astype(np.float32)
    back_rgb = np.median(frame_of(pixels), axis=0)
    background = name_colour(back_rgb)
    ends = tones(background) if background != UNKNOWN else np.stack([back_rgb, back_rgb + 1])
    away = smoothed(distance_to_tones(pixels, ends))
    mask = largest_part(away > MIN_CONTRAST)
    colour = core_colour(pixels, mask)
    if colour != UNKNOWN:
        # Both colours are known now: refine the mask, with its edge where both are equally near.
        mask = largest_part(away > smoothed(distance_to_tones(pixels, tones(colour))))
    if mask.mean() < MIN_AREA:
        return Reading(UNKNOWN, UNKNOWN, background, 0.0, 0.0, 0.0, 0.0, mask)
    mask = without_specks(mask)
    shape, overlap = name_shape(mask)
    x, y, half = box(mask)
    longer, lower = extent(shape) if shape != UNKNOWN else (1.0, 0.0)
    radius = half / longer
    return Reading(shape, colour, background, overlap, x, y - lower * radius, radius, mask)


def core_colour(pixels: npt.NDArray[np.floating], mask: Mask) -> str:
    """The colour in the middle of a mask, two pixels from its rim, or "unknown" if no pixel is that far in."""
    core = eroded(mask, 2)
    return name_colour(pixels[core].mean(axis=0)) if core.any() else UNKNOWN


def frame_of(pixels: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """The border pixels `(n, 3)`."""
    inside = np.zeros(pixels.shape[:2], bool)
    inside[FRAME:-FRAME, FRAME:-FRAME] = True
    return pixels[~inside]


def smoothed(plane: Plane) -> Plane:
    """The 3x3 mean, so that single noisy pixels have little effect."""
    padded = np.pad(plane, 1, mode="edge")
    rows, columns = plane.shape
    parts = [padded[i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    mean: Plane = np.mean(parts, axis=0, dtype=np.float32)
    return mean


def spread(mask: Mask) -> Mask:
    """The mask and its four neighbours."""
    out = mask.copy()
    out[1:] |= mask[:-1]
    out[:-1] |= mask[1:]
    out[:, 1:] |= mask[:, :-1]
    out[:, :-1] |= mask[:, 1:]
    return out


def eroded(mask: Mask, times: int) -> Mask:
    """The mask without the outer `times` pixels."""
    for _ in range(times):
        mask = ~spread(~mask)
    return mask


def flooded(seed: Mask, allowed: Mask) -> Mask:
    """All of `allowed` that is connected to `seed`."""
    reached = seed & allowed
    while True:
        grown = spread(spread(spread(reached) & allowed) & allowed) & allowed
        if grown.sum() == reached.sum():
            return reached
        reached = grown


def parts_of(mask: Mask, least: int) -> list[Mask]:
    """The connected parts of at least `least` pixels, largest first."""
    parts = []
    rest = mask.copy()
    while rest.sum() >= least:
        seed = np.zeros_like(rest)
        seed.flat[int(rest.argmax())] = True
        part = flooded(seed, rest)
        rest &= ~part
        if part.sum() >= least:
            parts.append(part)
    return sorted(parts, key=lambda part: -int(part.sum()))


def largest_part(mask: Mask) -> Mask:
    """The largest connected part, or an empty mask."""
    parts = parts_of(mask, 40)
    return parts[0] if parts else np.zeros_like(mask)


def without_specks(mask: Mask) -> Mask:
    """The mask with small holes filled; a ring's hole, at least a tenth of the shape, stays."""
    filled = mask.copy()
    outside = np.zeros_like(mask)
    outside[0], outside[-1], outside[:, 0], outside[:, -1] = True, True, True, True
    holes = ~mask & ~flooded(outside, ~mask)
    for hole in parts_of(holes, 1):
        if hole.sum() < 0.1 * mask.sum():
            filled |= hole
    return filled


def box(mask: Mask) -> tuple[float, float, float]:
    """Centre x, y and half the longer side of a mask's bounding box, in pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    return (left + right) / 2, (top + bottom) / 2, max(bottom - top, right - left) / 2


def normalised(mask: Mask, scale: float = 1.0) -> Mask:
    """The mask's bounding square with a 10 % margin, times `scale`, sampled on a small grid."""
    x, y, half = box(mask)
    steps = (np.arange(_GRID) + 0.5) / _GRID * 2 - 1
    columns = np.floor(x + 1.1 * scale * half * steps).astype(int)
    rows = np.floor(y + 1.1 * scale * half * steps).astype(int)
    inside = np.logical_and.outer((rows >= 0) & (rows < SIDE), (columns >= 0) & (columns < SIDE))
    sampled: Mask = mask[np.ix_(rows.clip(0, SIDE - 1), columns.clip(0, SIDE - 1))] & inside
    return sampled


@lru_cache
def templates(shape: str) -> Mask:
    """Ideal masks `(n, grid, grid)` of a shape on the small grid, at slightly different scales and offsets."""
    ideal = shape_mask(shape, SIDE / 2, SIDE / 2, 45.0) > 0.5
    sizes = [normalised(ideal, scale) for scale in (0.93, 1.0, 1.08)]
    offsets = range(-3, 4)
    return np.stack([np.roll(one, (i, j), axis=(0, 1)) for one in sizes for i in offsets for j in offsets])


def best_overlap(seen: Mask, ideals: Mask) -> float:
    """The largest intersection over union of a mask with any of the templates."""
    common = (seen & ideals).sum(axis=(1, 2))
    return float((common / (seen | ideals).sum(axis=(1, 2))).max())


@lru_cache
def rim_share(shape: str) -> float:
    """Outline over area of an ideal shape, times half the longer side of its box."""
    ideal = shape_mask(shape, SIDE / 2, SIDE / 2, 50.0) > 0.5
    # Rim pixels undercount a slanted outline by up to a third; the limits allow for that.
    return float((ideal & ~eroded(ideal, 1)).sum() / ideal.sum() * box(ideal)[2])


def least_overlap(shape: str, half: float) -> float:
    """The minimum overlap with its template for a shape of this half width in pixels."""
    return float(np.clip(1 - WOBBLE * rim_share(shape) / half, MIN_OVERLAP, MAX_OVERLAP))


def name_shape(mask: Mask) -> tuple[str, float]:
    """The shape whose template overlaps a mask best (intersection over union), or "unknown"; and that overlap."""
    seen = normalised(mask)
    overlaps = {shape: best_overlap(seen, templates(shape)) for shape in SHAPES}
    first, second = sorted(overlaps, key=lambda shape: -overlaps[shape])[:2]
    overlap, lead = overlaps[first], overlaps[first] - overlaps[second]
    close = overlap >= least_overlap(first, box(mask)[2]) and lead >= MIN_LEAD
    alone = overlap >= ALONE_OVERLAP and lead >= ALONE_LEAD
    return (first if close or alone else UNKNOWN), overlap
