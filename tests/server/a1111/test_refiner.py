"""The place of the refiner: a table that A1111's rule gave, computed with torch alone."""

import pytest

from sdxl_trt.engines.bundle import read_bundle
from sdxl_trt.mini import bundle_path
from sdxl_trt.runtime.diffusion.schedules import Schedule, make_comfyui_schedule
from sdxl_trt.server.a1111.body import choose
from sdxl_trt.server.a1111.refiner import switch_step

SHARES = (0.001, 0.2, 0.5, 0.63, 0.8, 0.9, 0.999, 1.0)
# Made with torch: the model's sigmas, k-diffusion's and A1111's schedules, and before every call the question of
# apply_refiner, argmin(abs(sigmas - sigma)) and (999 - t) / 1000 < refiner_switch_at, in torch's own types.
GOLDEN = {
    ("Uniform", 4): (1, 1, 2, 2, 3, 3, 3, 4),
    ("Uniform", 20): (1, 4, 10, 12, 16, 18, 19, 20),
    ("Uniform", 25): (1, 5, 12, 16, 20, 22, 24, 25),
    ("Uniform", 30): (1, 6, 15, 19, 24, 27, 29, 30),
    ("Uniform", 50): (1, 10, 25, 31, 40, 45, 49, 50),
    ("Karras", 4): (1, 1, 2, 2, 2, 3, 3, 4),
    ("Karras", 20): (1, 5, 9, 11, 12, 14, 19, 20),
    ("Karras", 25): (1, 6, 12, 13, 16, 17, 24, 25),
    ("Karras", 30): (1, 7, 14, 16, 19, 21, 29, 30),
    ("Karras", 50): (1, 12, 23, 27, 31, 35, 49, 50),
    ("Exponential", 4): (1, 1, 2, 2, 2, 2, 3, 4),
    ("Exponential", 20): (1, 4, 7, 9, 10, 12, 19, 20),
    ("Exponential", 25): (1, 5, 9, 11, 13, 15, 24, 25),
    ("Exponential", 30): (1, 5, 11, 13, 16, 18, 29, 30),
    ("Exponential", 50): (1, 9, 18, 21, 26, 30, 48, 50),
    ("SGM Uniform", 20): (1, 4, 10, 13, 17, 19, 20, 20),
    ("SGM Uniform", 30): (1, 6, 15, 19, 25, 28, 30, 30),
    ("Simple", 20): (1, 4, 10, 13, 16, 18, 20, 20),
    ("Simple", 30): (1, 6, 15, 19, 24, 27, 30, 30),
}


def _grid(scheduler: str, steps: int) -> Schedule:
    base = read_bundle(bundle_path()).manifest.base.scheduler
    return make_comfyui_schedule(base, steps, "euler", choose("Euler", scheduler).schedule)


@pytest.mark.parametrize(("scheduler", "steps"), GOLDEN)
def test_the_base_takes_the_steps_that_a1111s_rule_gives_it(scheduler: str, steps: int) -> None:
    grid = _grid(scheduler, steps)
    assert tuple(switch_step(grid, share) for share in SHARES) == GOLDEN[scheduler, steps]


def test_nothing_and_zero_change_before_the_first_step() -> None:
    grid = _grid("Karras", 20)
    assert [switch_step(grid, at) for at in (None, 0.0)] == [0, 0]
    assert switch_step(grid, 0.0, begin=7) == 7


@pytest.mark.parametrize("scheduler", ["Uniform", "Karras", "Exponential"])
def test_by_steps_the_schedule_does_not_matter(scheduler: str) -> None:
    grid = _grid(scheduler, 30)
    assert [switch_step(grid, at, by_steps=True) for at in (0.0, 0.5, 0.8, 0.81, 0.99, 1.0)] == [0, 15, 24, 25, 30, 30]


def test_a_picture_counts_its_own_steps_by_steps_and_the_noise_by_default() -> None:
    grid = _grid("Uniform", 20)
    assert switch_step(grid, 0.5, begin=10, by_steps=True) == 15
    assert switch_step(grid, 0.8, begin=10) == switch_step(grid, 0.8) == 16
    assert switch_step(grid, 0.2, begin=10) == 10
