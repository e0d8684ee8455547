"""Damage: blur, grain and a watermark on a share of the pictures, and the aesthetic score that they lower."""

__all__ = ["Damage", "aesthetic_score", "apply_damage", "sample_damage"]

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from sdxl_trt.mini.scenes.drawing import SIDE, Picture

MAX_BLUR = 2.6
MAX_GRAIN = 38.0
CLEAN_SCORES = (6.0, 10.0)
"""Undamaged pictures get a random score in this range, as raters differ; damaged ones get 5.5 at most."""


@dataclass(frozen=True)
class Damage:
    """A picture's damage: Gaussian blur radius (pixels), grain (standard deviation on 0..255), a watermark."""

    blur: float = 0.0
    grain: float = 0.0
    watermark: bool = False

    @property
    def amount(self) -> float:
        """0 (none) to 1 (worst)."""
        worst = max(self.blur / MAX_BLUR, self.grain / MAX_GRAIN)
        return min(1.0, worst + 0.25 * self.watermark)


def sample_damage(rng: np.random.Generator) -> Damage:
    """Damage of a random kind and strength, never none."""
    kind = rng.integers(4)
    strength = rng.uniform(0.15, 1.0)
    return Damage(
        blur=MAX_BLUR * strength if kind in (0, 3) else 0.0,
        grain=MAX_GRAIN * strength * (0.5 if kind == 3 else 1.0) if kind in (1, 3) else 0.0,
        watermark=bool(kind == 2 or rng.random() < 0.2),
    )


def aesthetic_score(damage: Damage, rng: np.random.Generator) -> float:
    """1 to 10: 6 or more for clean pictures, from 5.5 down to 1 for growing damage."""
    if damage.amount == 0:
        return float(rng.uniform(*CLEAN_SCORES))
    return float(np.clip(5.5 - 4.5 * damage.amount + rng.normal(0, 0.2), 1.0, 5.5))


def apply_damage(picture: Picture, damage: Damage, rng: np.random.Generator) -> Picture:
    """A damaged copy of a `(SIDE, SIDE, 3)` uint8 picture."""
    image = Image.fromarray(picture)
    if damage.blur:
        image = image.filter(ImageFilter.GaussianBlur(damage.blur))
    if damage.watermark:
        _stamp(image, rng)
    pixels = np.asarray(image)
    if not damage.grain:
        return pixels.copy()
    grainy: Picture = np.clip(np.rint(pixels + _grain(damage.grain, rng)), 0, 255).astype(np.uint8)
    return grainy


def _grain(strength: float, rng: np.random.Generator) -> np.ndarray:
    """Grey noise `(SIDE, SIDE, 1)` float32: clumps of four pixels (film grain) plus single-pixel noise."""
    clumps = rng.normal(0, 0.8 * strength, (SIDE // 4, SIDE // 4)).astype(np.float32)
    coarse = np.asarray(Image.fromarray(clumps).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    fine = rng.normal(0, 0.6 * strength, (SIDE, SIDE)).astype(np.float32)
    return (coarse + fine)[..., None]


def _stamp(image: Image.Image, rng: np.random.Generator) -> None:
    """Paste a small half-transparent plate with three strokes into one of the four corners."""
    left, top = (int(rng.choice((4, SIDE - 36))), int(rng.choice((4, SIDE - 18))))
    plate = Image.new("L", (32, 14), 110)
    pen = ImageDraw.Draw(plate)
    for stroke in range(3):
        pen.line((5 + 9 * stroke, 11, 9 + 9 * stroke, 2), fill=220, width=3)
    grey = Image.new("RGB", plate.size, (128, 128, 128))
    image.paste(grey, (left, top), plate)
