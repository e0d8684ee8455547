"""The scorer: right on clean renders, strict on wrong pictures, and its quality measures follow the damage."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from sdxl_trt.mini.scenes.captions import Asked, draw_caption
from sdxl_trt.mini.scenes.damage import Damage, apply_damage
from sdxl_trt.mini.scenes.drawing import COLOURS, SHAPES, Picture
from sdxl_trt.mini.scenes.scenes import VALIDATION_SEEDS, Scene, render, sample_scene
from sdxl_trt.mini.score.reading import UNKNOWN, read
from sdxl_trt.mini.score.score import score_picture

ALL_PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
STAR = Scene(Asked("star", "red", "blue", "large", "centre", "plain", "plain"), 64.0, 64.0, 42.0)
CAPTION = "a large red star on a blue background in the centre"


def clean_render(seed: int) -> tuple[Picture, str]:
    rng = np.random.default_rng(VALIDATION_SEEDS[seed])
    scene = sample_scene(rng, ALL_PAIRS)
    return render(scene), draw_caption(scene.asked, rng)


def test_clean_renders_are_right() -> None:
    found = [score_picture(*clean_render(seed)) for seed in range(200)]
    assert np.mean([one.right for one in found]) >= 0.99
    assert np.mean([one.size and one.position for one in found]) >= 0.99
    assert np.mean([one.sharpness for one in found]) > 0.98
    assert np.mean([one.damage for one in found]) < 0.1


def test_damaged_renders_are_still_recognized() -> None:
    spoilt = [Damage(blur=1.3), Damage(grain=15.0), Damage(watermark=True)]
    rng = np.random.default_rng(0)
    cases = [clean_render(seed) for seed in range(60)]
    found = [score_picture(apply_damage(p, spoilt[i % 3], rng), caption) for i, (p, caption) in enumerate(cases)]
    assert np.mean([one.right for one in found]) >= 0.9


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("a large red circle on a blue background", "shape"),
        ("a large orange star on a blue background", "colour"),
        ("a large red star on a purple background", "background"),
        ("a small red star on a blue background", "size"),
        ("a red star on a blue background on the left", "position"),
    ],
)
def test_only_the_wrong_part_fails(caption: str, wrong: str) -> None:
    found = score_picture(render(STAR), caption)
    parts = {part: getattr(found, part) for part in ("shape", "colour", "background", "size", "position")}
    assert parts == {part: part != wrong for part in parts}


def test_swapped_colours_are_wrong() -> None:
    assert score_picture(render(STAR), CAPTION).right
    assert not score_picture(render(STAR), "a large blue star on a red background in the centre").right


def test_every_other_shape_is_wrong() -> None:
    for drawn in SHAPES:
        picture = render(replace(STAR, asked=replace(STAR.asked, shape=drawn)))
        answers = [shape for shape in SHAPES if score_picture(picture, f"a red {shape} on a blue background").right]
        assert answers == [drawn]


def hexagon() -> Picture:
    y, x = np.mgrid[0:128, 0:128] - 63.5
    inside = np.maximum(np.abs(x), 0.5 * np.abs(x) + 0.87 * np.abs(y)) < 25
    halves = np.where(x < 0, 0, 255)[..., None] * np.ones(3)
    return np.where(inside[..., None] & (y > 0)[..., None], (220, 30, 30), halves).astype(np.uint8)


def blob() -> Picture:
    picture = render(STAR).copy()
    picture[40:100, 30:60] = (220, 30, 30)
    return picture


def noise() -> Picture:
    return np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)


def nothing() -> Picture:
    return np.full((128, 128, 3), (40, 70, 220), np.uint8)


def muddy() -> Picture:
    """Red replaced by a dull brown that is none of the colours."""
    picture = render(STAR).copy()
    picture[(picture == (220, 30, 30)).all(axis=-1)] = (120, 90, 70)
    return picture


@pytest.mark.parametrize("draw", [hexagon, blob, noise, nothing, muddy])
def test_pictures_without_a_shape_match_nothing(draw: Callable[[], Picture]) -> None:
    seen = read(draw())
    assert UNKNOWN in (seen.shape, seen.colour, seen.background)


def test_sharpness_and_damage_follow_the_damage() -> None:
    rng = np.random.default_rng(0)
    blurred = [score_picture(apply_damage(render(STAR), Damage(blur=b), rng), CAPTION) for b in (0.0, 0.8, 1.6, 2.6)]
    grained = [score_picture(apply_damage(render(STAR), Damage(grain=g), rng), CAPTION) for g in (0.0, 5.0, 15.0, 38.0)]
    sharpness = [one.sharpness for one in blurred]
    assert sharpness[0] > 0.98
    assert all(a > b for a, b in itertools.pairwise(sharpness))
    assert all(a.damage < b.damage for found in (blurred, grained) for a, b in itertools.pairwise(found))
    assert (
        score_picture(apply_damage(render(STAR), Damage(watermark=True), rng), CAPTION).damage > blurred[0].damage + 0.1
    )
