"""The data set: seeded scenes of one shape on a background, with caption, size conditioning and aesthetic score.

Seeds: training uses `TRAINING_SEEDS`, checks during training use `VALIDATION_SEEDS`, evaluation uses
`EVALUATION_SEEDS`. Evaluation captions are texts that training never sees (`captions.is_for_evaluation`), and the
(colour, shape) pairs of `HELD_OUT` are never drawn for training.
"""

__all__ = [
    "EVALUATION_SEEDS",
    "HELD_OUT",
    "TRAINING_SEEDS",
    "VALIDATION_SEEDS",
    "Scene",
    "View",
    "example",
    "render",
    "sample_scene",
    "training_pairs",
]

from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdxl_trt.mini.scenes.captions import POSITIONS, SIZES, Asked, draw_caption
from sdxl_trt.mini.scenes.damage import Damage, aesthetic_score, apply_damage, sample_damage
from sdxl_trt.mini.scenes.drawing import (
    COLOURS,
    FILL_CONTRAST,
    FILLS,
    SHAPES,
    SIDE,
    TEXTURE_CONTRAST,
    TEXTURES,
    Picture,
    compose,
    shape_mask,
    toned,
)

HELD_OUT = (
    ("black", "circle"),
    ("white", "square"),
    ("yellow", "triangle"),
    ("purple", "star"),
    ("green", "ring"),
    ("orange", "cross"),
)
TRAINING_SEEDS = range(10_000_000)
VALIDATION_SEEDS = range(10_000_000, 20_000_000)
EVALUATION_SEEDS = range(20_000_000, 30_000_000)

DEGRADED_SHARE = 0.3
RADII = {"small": (19.0, 24.0), "medium": (28.0, 35.0), "large": (39.0, 46.0)}
MARGIN = 6.0
"""Minimum distance in pixels between shape and frame, before cropping."""
_POSITION_CHANCES = np.array([0.44, 0.1, 0.1, 0.1, 0.1, 0.04, 0.04, 0.04, 0.04])


@dataclass(frozen=True)
class Scene:
    """One drawable scene: its properties, as captions name them, and its centre and radius in pixels."""

    asked: Asked
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class View:
    """SDXL's size conditioning of a training picture: original size and crop corner, in pixels."""

    height: int = SIDE
    width: int = SIDE
    top: int = 0
    left: int = 0

    @property
    def time_ids(self) -> tuple[int, ...]:
        """The base's six: original height and width, crop top and left, target height and width."""
        return (self.height, self.width, self.top, self.left, SIDE, SIDE)


@dataclass(frozen=True)
class Example:
    """One captioned picture `(SIDE, SIDE, 3)` uint8 with all its conditioning."""

    picture: Picture
    caption: str
    scene: Scene
    view: View
    damage: Damage
    score: float


def training_pairs() -> list[tuple[str, str]]:
    """Every (colour, shape) except the held-out ones."""
    return [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT]


def sample_scene(rng: np.random.Generator, pairs: list[tuple[str, str]] | None = None) -> Scene:
    """A random scene with a (colour, shape) from `pairs` (default: the training pairs)."""
    allowed = training_pairs() if pairs is None else pairs
    colour, shape = allowed[rng.integers(len(allowed))]
    others = [name for name in COLOURS if name != colour]
    size = SIZES[rng.integers(len(SIZES))]
    position = list(POSITIONS)[rng.choice(len(POSITIONS), p=_POSITION_CHANCES)]
    radius = rng.uniform(*RADII[size])
    x, y = _centre(position, radius, rng)
    fill = FILLS[rng.choice(3, p=(0.6, 0.2, 0.2))]
    texture = TEXTURES[rng.choice(3, p=(0.6, 0.2, 0.2))]
    background = others[rng.integers(len(others))]
    return Scene(Asked(shape, colour, background, size, position, fill, texture), x, y, radius)


def _centre(position: str, radius: float, rng: np.random.Generator) -> tuple[float, float]:
    """A centre for the position word: 12 to 26 pixels off-centre if the frame leaves that much room."""
    room = SIDE / 2 - 1.05 * radius - MARGIN
    away = min(room, rng.uniform(18, 28))
    jitter = rng.uniform(-4, 4, 2)
    x = ("right" in position) * away - ("left" in position) * away
    y = ("bottom" in position) * away - ("top" in position) * away
    dx, dy = np.clip((x + jitter[0], y + jitter[1]), -room, room)
    return float(SIDE / 2 + dx), float(SIDE / 2 + dy)


def render(scene: Scene, view: View | None = None, border: float = 0.0) -> Picture:
    """The clean picture `(SIDE, SIDE, 3)` uint8 of a scene, seen through `view` (default: the whole scene).

    With `border` the shape is a sticker: it has a white border of that many pixels.
    """
    view = view or View()
    # A view wider or higher than the target is resized to fit and then cropped, so the scene's centre moves.
    wide, high = _resized(view)
    x = scene.x + (wide - SIDE) / 2 - view.left
    y = scene.y + (high - SIDE) / 2 - view.top
    asked = scene.asked
    front = toned(asked.colour, asked.fill, FILL_CONTRAST, view.top, view.left)
    back = toned(asked.background, asked.texture, TEXTURE_CONTRAST, view.top, view.left)
    if border:
        rim = shape_mask(asked.shape, x, y, scene.radius, border)
        back = compose(rim, toned("white", "plain", 0), back).astype(np.float32)
    picture = compose(shape_mask(asked.shape, x, y, scene.radius), front, back)
    return _enlarged(picture, min(view.height, view.width))


def _resized(view: View) -> tuple[int, int]:
    """Width and height after resizing the shorter side to the target's."""
    short = min(view.width, view.height)
    return round(view.width * SIDE / short), round(view.height * SIDE / short)


def _enlarged(picture: Picture, original: int) -> Picture:
    """The picture as if from a smaller original: shrunk and enlarged again, so it is soft."""
    if original >= SIDE:
        return picture
    small = Image.fromarray(picture).resize((original, original), Image.Resampling.BOX)
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).copy()


def sample_view(rng: np.random.Generator) -> View:
    """Mostly the whole picture at its own size; otherwise a smaller or larger original, or a crop of a longer one."""
    kind = rng.random()
    if kind < 0.72:
        return View()
    if kind < 0.84:
        side = int(rng.integers(32, 112))
        return View(side, side)
    if kind < 0.90:
        side = int(rng.integers(SIDE, 2 * SIDE))
        return View(side, side)
    extra = int(rng.integers(8, 49))
    cut = int(rng.integers(0, extra + 1))
    if rng.random() < 0.5:
        return View(SIDE, SIDE + extra, 0, cut)
    return View(SIDE + extra, SIDE, cut, 0)


def example(seed: int) -> Example:
    """The training example of a seed, reproducible with the same versions of numpy and Pillow."""
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    view = sample_view(rng)
    damage = sample_damage(rng) if rng.random() < DEGRADED_SHARE else Damage()
    caption = draw_caption(scene.asked, rng)
    picture = apply_damage(render(scene, view), damage, rng)
    return Example(picture, caption, scene, view, damage, aesthetic_score(damage, rng))
