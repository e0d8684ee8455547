"""Brownian noise against golden vectors of torchsde (golden/make_brownian.py), its statistics, and its users."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.bundle.manifest import Scheduler
from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.diffusion.noise.brownian import DECIMALS, KEPT, BrownianPath
from sdxl_trt.runtime.diffusion.noise.sources import BatchNoise, NoiseSource, PictureNoise, Span
from sdxl_trt.runtime.diffusion.samplers.base import Noise
from sdxl_trt.runtime.diffusion.samplers.registry import BROWNIAN, brownian_span, sampler_names
from sdxl_trt.runtime.diffusion.schedules.schedule import make_schedule

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("brownian.json").read_text(encoding="utf-8"))
REQUIRED = 2e-6
"""torch evaluates logarithm and cosine with its own polynomials: 3 units in the last place of a normal value."""
SHAPE = (1, 4, 4, 4)
LOW, HIGH = 0.029168, 14.614641


def _path(seed: int = 3, shape: tuple[int, ...] = SHAPE) -> BrownianPath:
    return BrownianPath(shape, LOW, HIGH, seed)


def _gain(path: BrownianPath, high: float, low: float) -> np.ndarray:
    return path(high, low) * np.sqrt(np.float32(high) - np.float32(low))


@pytest.mark.parametrize("seed", GOLDEN["noises"])
def test_noise_is_that_of_torchsdes_tree(seed: str) -> None:
    path = BrownianPath(tuple(GOLDEN["shape"]), *GOLDEN["ends"], int(seed))
    for way, expected in zip(GOLDEN["ways"], GOLDEN["noises"][seed], strict=True):
        found = path(*way)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found.ravel(), expected, rtol=0, atol=REQUIRED, err_msg=f"{seed}, {way}")


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(LOW, HIGH), min_size=3, max_size=6, unique_by=lambda value: round(value, 3)))
def test_the_increment_of_an_interval_is_the_sum_of_its_parts(sigmas: list[float]) -> None:
    falling = sorted(sigmas, reverse=True)
    path = _path()
    parts = [_gain(path, high, low) for high, low in pairwise(falling)]
    np.testing.assert_allclose(sum(parts), _gain(path, falling[0], falling[-1]), rtol=0, atol=2e-5)


def test_noise_does_not_depend_on_the_order_of_calls() -> None:
    """It does not depend on what is cached either."""
    ways = list(pairwise(np.geomspace(14, 0.04, 13).tolist()))
    halvings = math.ceil(math.log2(HIGH / 10.0**-DECIMALS))
    assert len(ways) * halvings / 2 > KEPT, "some increments are computed again"
    path, expected = _path(), [_path()(*way) for way in ways[::4]]
    backwards = {way: path(*way) for way in reversed(ways)}
    for way, noise in zip(ways[::4], expected, strict=True):
        np.testing.assert_allclose(backwards[way], noise, rtol=0, atol=REQUIRED)


def test_adjacent_intervals_are_independent_and_have_unit_variance() -> None:
    path = _path(shape=(1, 4, 64, 64))
    noises = [path(high, low).ravel() for high, low in [(14.0, 9.0), (9.0, 8.9), (8.9, 1.0), (1.0, 0.03)]]
    measured = np.cov(noises)
    assert np.abs(measured - np.eye(4)).max() < 0.05


def test_seeds_differ_and_an_empty_interval_has_no_noise() -> None:
    assert np.abs(_path(1)(9.0, 2.0) - _path(2)(9.0, 2.0)).max() > 0.1
    assert not _path()(2.0, 2.0).any()
    assert not BrownianPath(SHAPE, 2.0, 2.0, 3)(2.0, 2.0).any()


def test_the_caller_may_change_the_noise() -> None:
    path = _path()
    first = path(9.0, 2.0)
    kept = first.copy()
    first *= 5
    np.testing.assert_array_equal(path(9.0, 2.0), kept)
    whole = path(HIGH, LOW)
    whole *= 5
    assert np.abs(path(HIGH, LOW)).max() < 5


@pytest.mark.parametrize("noise", [PictureNoise([5, 6, 7]), BatchNoise(5, 3)])
def test_a_pictures_noise_does_not_depend_on_which_pictures_share_a_call(noise: NoiseSource) -> None:
    shape, span = (4, 4, 4), (LOW, HIGH)
    everyone = noise.source(shape, slice(0, 3), span)(9.0, 2.0)
    for part in (slice(0, 1), slice(1, 3)):
        np.testing.assert_array_equal(noise.source(shape, part, span)(9.0, 2.0), everyone[part])
    assert np.abs(everyone[0] - everyone[1]).max() > 0.1


def test_a_picture_has_the_path_of_its_seed_and_a_batch_one_path() -> None:
    shape, way = (4, 4, 4), (9.0, 2.0)
    found = PictureNoise([5, 6]).source(shape, slice(1, 2), (LOW, HIGH))(*way)
    np.testing.assert_array_equal(found[0], BrownianPath(shape, LOW, HIGH, 6)(*way))
    found = BatchNoise(5, 2).source(shape, slice(0, 2), (LOW, HIGH))(*way)
    np.testing.assert_array_equal(found, BrownianPath((2, *shape), LOW, HIGH, 5)(*way))


def test_comfyuis_paths_cover_a_part_and_diffusers_path_the_whole_grid() -> None:
    grid = make_schedule(Scheduler(), 10).sigmas
    part = np.append(grid[2:6], np.float32(0.0))
    for name in sampler_names(comfyui=True):
        comfyui, diffusers = (brownian_span(name, part, grid, comfyui=flag) for flag in (True, False))
        assert comfyui == ((float(grid[5]), float(grid[2])) if name in BROWNIAN else None), name
        assert diffusers == ((float(grid[9]), float(grid[0])) if name == "dpmpp_sde" else None), name


def test_each_stage_of_a_run_has_the_path_of_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[Span | None] = []
    source = BatchNoise.source

    def recorded(self: BatchNoise, shape: tuple[int, ...], pictures: slice, span: Span | None = None) -> Noise:
        spans.append(span)
        return source(self, shape, pictures, span)

    monkeypatch.setattr(BatchNoise, "source", recorded)
    request = Request("", compat="comfyui", sampler="dpmpp_2m_sde", refiner_sampler="euler_ancestral", steps=3,
                      handoff_step=2, seed=1, width=64, height=64)  # fmt: skip
    with open_bundle() as pipeline:
        assert len(list(pipeline.generate(request))) == 1
    sigmas = pipeline.run.request.schedule.sigmas
    assert spans == [(float(sigmas[2]), float(sigmas[0])), None]
