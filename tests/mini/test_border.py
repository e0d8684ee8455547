"""The border's scorer: exact on clean stickers, zero without a border, and refuses what it cannot see."""

import numpy as np
import pytest

from sdxl_trt.mini.scenes import VALIDATION_SEEDS, Picture, draw_caption, render, sample_scene
from sdxl_trt.mini.score import border_width


def stickers(border: float, count: int = 16) -> list[tuple[Picture, str]]:
    """Return clean renders without white, and their captions."""
    made = []
    for seed in VALIDATION_SEEDS[:count]:
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng)
        if "white" not in (scene.asked.colour, scene.asked.background):
            made.append((render(scene, border=border), draw_caption(scene.asked, rng)))
    return made


@pytest.mark.parametrize("width", [0.0, 2.5, 5.0])
def test_clean_borders_are_measured_to_a_pixel(width: float) -> None:
    found = np.array([border_width(*one) for one in stickers(width)])
    assert len(found) >= 10
    assert found.mean() == pytest.approx(width, abs=0.7)
    assert found.std() < 0.5
    if not width:
        assert found.max() == 0


def test_a_picture_without_a_shape_has_no_border() -> None:
    assert border_width(np.full((128, 128, 3), (40, 70, 220), np.uint8), "a red star on a blue background") == 0


@pytest.mark.parametrize("caption", ["a white star on a blue background", "a red star on a white background"])
def test_white_is_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="beside which a white border is invisible"):
        border_width(stickers(5.0)[0][0], caption)
