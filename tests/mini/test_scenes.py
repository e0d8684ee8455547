"""The data set: deterministic, with true captions, conditioned as in SDXL's paper, and split as documented."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from sdxl_trt.mini.scenes.captions import TEMPLATES, Asked, caption_for, draw_caption, is_for_evaluation, read_caption
from sdxl_trt.mini.scenes.damage import Damage, aesthetic_score, apply_damage
from sdxl_trt.mini.scenes.drawing import COLOURS, FILLS, SHAPES, TEXTURES, pattern, shape_mask
from sdxl_trt.mini.scenes.scenes import (
    EVALUATION_SEEDS,
    HELD_OUT,
    TRAINING_SEEDS,
    VALIDATION_SEEDS,
    Scene,
    View,
    example,
    render,
    sample_scene,
    training_pairs,
)

RED_STAR = Scene(Asked("star", "red", "blue", fill="plain", texture="plain"), 64.0, 64.0, 40.0)


def test_an_example_depends_only_on_its_seed() -> None:
    first, again, other = example(7), example(7), example(8)
    assert (first.picture == again.picture).all()
    assert first.caption == again.caption
    assert first.picture.shape == (128, 128, 3)
    assert first.picture.dtype == np.uint8
    assert (first.picture != other.picture).any()


def test_seed_ranges_do_not_overlap() -> None:
    ranges = (TRAINING_SEEDS, VALIDATION_SEEDS, EVALUATION_SEEDS)
    assert all(left.stop <= right.start for left, right in pairwise(ranges))


def test_held_out_pairs_never_appear_in_training() -> None:
    pairs = {(e.scene.asked.colour, e.scene.asked.shape) for e in map(example, range(600))}
    assert pairs <= set(training_pairs())
    assert len(training_pairs()) == len(COLOURS) * len(SHAPES) - len(HELD_OUT)
    assert not set(HELD_OUT) & set(training_pairs())
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)


def test_training_never_uses_evaluation_captions() -> None:
    rng = np.random.default_rng(0)
    asked = sample_scene(rng).asked
    assert not any(is_for_evaluation(example(seed).caption) for seed in range(200))
    assert all(is_for_evaluation(draw_caption(asked, rng, evaluation=True)) for _ in range(20))


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_caption_is_parsed_correctly(template: str) -> None:
    full = Asked("ring", "orange", "black", "small", "bottom left", "dotted", "lined")
    bare = Asked("cross", "white", "orange")
    assert read_caption(caption_for(full, template)) == full
    assert read_caption(caption_for(bare, template)) == bare


def test_articles_follow_the_next_word() -> None:
    assert caption_for(Asked("star", "orange", "orange"), TEMPLATES[0]) == "an orange star on an orange background"


@pytest.mark.parametrize("caption", ["a red background", "a red star", "a red star and a ring on blue"])
def test_an_incomplete_caption_is_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="one shape and two colours"):
        read_caption(caption)


def test_clean_pictures_have_the_exact_colours() -> None:
    picture = render(RED_STAR)
    assert tuple(picture[64, 64]) == (220, 30, 30)
    assert tuple(picture[2, 2]) == (40, 70, 220)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sticker_has_a_white_border_of_even_width(shape: str) -> None:
    scene = replace(RED_STAR, asked=replace(RED_STAR.asked, shape=shape))
    plain, sticker = render(scene), render(scene, border=5.0)
    inside = shape_mask(shape, 64, 64, 40) == 1
    assert (sticker[inside] == plain[inside]).all()
    white = (sticker == COLOURS["white"]).all(axis=-1)
    y, x = np.nonzero(white)
    at = np.stack(np.nonzero(shape_mask(shape, 64, 64, 40) > 0.5), axis=1)
    away = np.array([np.hypot(*(at - (row, column)).T).min() for row, column in zip(y, x, strict=True)])
    assert 4 < away.max() < 6.5
    beyond = np.ones_like(white)
    beyond[max(0, y.min() - 1) : y.max() + 2, max(0, x.min() - 1) : x.max() + 2] = False
    assert (sticker[beyond] == plain[beyond]).all()


def test_edges_are_antialiased_within_a_pixel() -> None:
    mask = shape_mask("circle", 64, 64, 30)
    between = (mask > 0.02) & (mask < 0.98)
    y, x = np.nonzero(between)
    assert between.any()
    assert np.abs(np.hypot(x + 0.5 - 64, y + 0.5 - 64) - 30).max() < 1.5


@pytest.mark.parametrize("kind", [kind for kind in (*FILLS, *TEXTURES) if kind != "plain"])
def test_patterns_have_both_tones(kind: str) -> None:
    assert 0.15 < pattern(kind).mean() < 0.6


def test_a_crop_shifts_the_scene_by_its_corner() -> None:
    left = render(RED_STAR, View(128, 160, 0, 0)).astype(int)
    right = render(RED_STAR, View(128, 160, 0, 8)).astype(int)
    assert View(128, 160, 0, 8).time_ids == (128, 160, 0, 8, 128, 128)
    assert (left[:, 8:] == right[:, :-8]).all()


def test_a_smaller_original_is_softer() -> None:
    sharp, soft = (np.abs(np.diff(render(RED_STAR, view).astype(int), axis=1)).max() for view in (View(), View(40, 40)))
    assert soft < 0.7 * sharp


def test_score_falls_with_damage() -> None:
    rng = np.random.default_rng(0)
    clean = [aesthetic_score(Damage(), rng) for _ in range(50)]
    by_blur = [aesthetic_score(Damage(blur=blur), rng) for blur in (0.5, 1.2, 2.6)]
    assert min(clean) >= 6
    assert max(clean) <= 10
    assert 5.5 > by_blur[0] > by_blur[1] > by_blur[2] >= 1


@pytest.mark.parametrize("damage", [Damage(blur=1.0), Damage(grain=12.0), Damage(watermark=True)])
def test_each_damage_changes_the_picture_but_not_its_source(damage: Damage) -> None:
    picture = render(RED_STAR)
    before = picture.copy()
    spoilt = apply_damage(picture, damage, np.random.default_rng(0))
    assert (picture == before).all()
    assert spoilt.shape == picture.shape
    assert np.abs(spoilt.astype(int) - picture).max() > 20
