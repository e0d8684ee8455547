"""Draw one scene: antialiased shape masks, fills and background textures, as 128x128 RGB."""

__all__ = [
    "COLOURS",
    "FILLS",
    "FILL_CONTRAST",
    "SHAPES",
    "SIDE",
    "STICKER_BORDER",
    "TEXTURES",
    "TEXTURE_CONTRAST",
    "Picture",
    "Plane",
    "compose",
    "extent",
    "pattern",
    "shade",
    "shape_mask",
    "toned",
]

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Picture = npt.NDArray[np.uint8]
Plane = npt.NDArray[np.float32]

SIDE = 128
"""Width and height of every picture, in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 220, 40),
    "purple": (130, 50, 170),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
FILLS = ("plain", "striped", "dotted")
TEXTURES = ("plain", "checked", "lined")

FILL_CONTRAST = 0.32
TEXTURE_CONTRAST = 0.14
RING_HOLE = 0.52
CROSS_ARM = 0.34
STAR_WAIST = 0.42
STICKER_BORDER = 5.0
"""Width in pixels of the white border around a sticker."""
_OVERSAMPLING = 4


def shade(colour: str, contrast: float) -> npt.NDArray[np.float32]:
    """The second tone of a fill or texture, `(3,)` float32: light colours darken, dark ones lighten."""
    rgb = np.asarray(COLOURS[colour], np.float32)
    light = colour in ("white", "yellow", "orange", "red", "green")
    return rgb * (1 - contrast) if light else rgb + (255 - rgb) * contrast


def outline(shape: str) -> npt.NDArray[np.float64]:
    """Corner points `(n, 2)` (x right, y down) of a polygonal shape of radius 1 around the origin."""
    if shape == "square":
        return np.array([(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)])
    if shape == "triangle":
        return np.array([(0.0, -0.95), (0.98, 0.8), (-0.98, 0.8)])
    if shape == "star":
        angles = -np.pi / 2 + np.pi / 5 * np.arange(10)
        radii = np.where(np.arange(10) % 2 == 0, 1.05, 1.05 * STAR_WAIST)
        return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    if shape == "cross":
        a, b = CROSS_ARM, 0.98
        half = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
        return np.array(half + [(-x, -y) for x, y in half])
    raise ValueError(f"{shape!r} has no corners; polygonal shapes are square, triangle, star, cross")


def extent(shape: str) -> tuple[float, float]:
    """For a shape of radius 1: half the longer side of its bounding box, and the y of that box's centre (down)."""
    if shape in ("circle", "ring"):
        return 1.0, 0.0
    low, high = outline(shape).min(axis=0), outline(shape).max(axis=0)
    return float((high - low).max() / 2), float((low + high)[1] / 2)


def shape_mask(shape: str, x: float, y: float, radius: float, border: float = 0.0) -> Plane:
    """Coverage `(SIDE, SIDE)` float32 in 0..1 of a shape, grown by `border`; centre, radius, border are in pixels."""
    k = _OVERSAMPLING
    canvas = Image.new("L", (SIDE * k, SIDE * k))
    pen = ImageDraw.Draw(canvas)
    cx, cy, r, more = x * k, y * k, radius * k, border * k
    if shape in ("circle", "ring"):
        _disc(pen, cx, cy, r + more, 255)
        if shape == "ring":
            _disc(pen, cx, cy, r * RING_HOLE - more, 0)
    else:
        corners = [(cx + r * px, cy + r * py) for px, py in outline(shape)]
        pen.polygon(corners, fill=255)
        if border:
            pen.line([*corners, *corners[:2]], fill=255, width=round(2 * more), joint="curve")
    cover: Plane = np.asarray(canvas.reduce(k), np.float32) / np.float32(255)
    return cover


def _disc(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: int) -> None:
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _soft(signed_distance: Plane) -> Plane:
    """Coverage of a half plane for a distance to its edge in pixels, with one pixel of antialiasing."""
    cover: Plane = np.clip(signed_distance + 0.5, 0, 1).astype(np.float32)
    return cover


@lru_cache
def pattern(kind: str) -> Plane:
    """Coverage `(2*SIDE, 2*SIDE)` float32 of the second tone of a fill or texture; crop it to shift its phase."""
    y, x = np.mgrid[0 : 2 * SIDE, 0 : 2 * SIDE].astype(np.float32) + 0.5
    covers: dict[str, Plane] = {
        "plain": np.zeros_like(x),
        "striped": _soft(np.abs((x + y) / np.sqrt(2) % 11.3137 - 5.65685) - 2.83),
        "dotted": _soft(2.9 - np.hypot(x % 10 - 5, y % 10 - 5)),
        "checked": ((x // 8 + y // 8) % 2).astype(np.float32),
        "lined": (y % 8 < 4).astype(np.float32),
    }
    return covers[kind]


def toned(colour: str, kind: str, contrast: float, top: int = 0, left: int = 0) -> Plane:
    """A surface `(SIDE, SIDE, 3)` float32 in 0..255 of a colour and its second tone, cropped at `top`, `left`."""
    cover = pattern(kind)[top : top + SIDE, left : left + SIDE, None]
    first = np.asarray(COLOURS[colour], np.float32)
    return first + cover * (shade(colour, contrast) - first)


def compose(mask: Plane, front: Plane, back: Plane) -> Picture:
    """`front` over `back` by `mask`, `(SIDE, SIDE, 3)` uint8, rounded."""
    cover = mask[..., None]
    return np.rint(back + cover * (front - back)).astype(np.uint8)
