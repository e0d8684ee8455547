"""When a ControlNet works, and how its residuals are scaled."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines.bundle.manifest import Scheduler
from sdxl_trt.runtime.diffusion.controls import ControlPart, comfyui_span, fraction_span
from sdxl_trt.runtime.diffusion.schedules.schedule import make_comfyui_schedule, make_schedule

TABLES = Path(__file__).parents[2] / "comfyui" / "tables.npz"
SDXL = Scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading")


def _kept(steps: int, start: float, end: float) -> list[bool]:
    """Return diffusers' controlnet_keep, from its pipeline's own words."""
    return [not (i / steps < start or (i + 1) / steps > end) for i in range(steps)]


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize(("start", "end"), [(0, 1), (0.3, 0.7), (0, 0.5), (0.5, 1), (0.31, 0.32), (1, 1), (0.1, 0.9)])
def test_a_step_has_the_controlnet_if_diffusers_keeps_it(start: float, end: float, first: int) -> None:
    for steps in (1, 2, 5, 10, 30):
        sigmas = make_schedule(SDXL, steps + first).sigmas
        above, up_to = fraction_span(sigmas, first, start, end)
        assert [above < float(sigma) <= up_to for sigma in sigmas[first:-1]] == _kept(steps, start, end)


def test_shares_of_the_timesteps_are_those_of_comfyui() -> None:
    """Where they fall on whole timesteps they are ComfyUI's own sigmas; between two, in their order."""
    schedule, table = make_comfyui_schedule(SDXL, 10), np.load(TABLES)["eps_table"]
    for timestep in (100, 500, 899):
        above, up_to = comfyui_span(schedule, 1 - timestep / 999, 1 - timestep / 999)
        assert up_to == pytest.approx(table[timestep], rel=1e-5)
        assert above == math.nextafter(up_to, -math.inf), "both ends are included"
    assert comfyui_span(schedule, 0.0, 1.0) == (math.nextafter(0.0, -math.inf), math.inf)
    between = comfyui_span(schedule, 1 - 500.5 / 999, 1.0)[1]
    assert table[500] < between < table[501]


def _part(**changes: Any) -> ControlPart:
    engine: Any = SimpleNamespace(component=SimpleNamespace(outputs=range(10)))
    return ControlPart(engine, np.zeros((3, 8, 8), np.float32), **changes)


def test_each_side_has_its_scale() -> None:
    scales = _part(positive=0.8, negative=0.5).scales(2, 4)
    assert np.array_equal(scales, np.float32([[0.8] * 10] * 2 + [[0.5] * 10] * 2))


def test_guess_mode_scales_the_levels_and_leaves_the_negative_side() -> None:
    scales = _part(positive=0.8, negative=0.8, guess=True).scales(1, 2)
    np.testing.assert_allclose(scales[0], 0.8 * 10 ** np.linspace(-1, 0, 10), rtol=1e-6)
    assert not scales[1].any()


def test_a_controlnet_without_a_scale_does_not_run() -> None:
    assert not _part(positive=0.0, negative=0.0).works(1.0, guided=True)
    assert _part(positive=0.0, negative=1.0).works(1.0, guided=True)
    assert not _part(positive=0.0, negative=1.0).works(1.0, guided=False)
    assert not _part(above=1.0).works(1.0, guided=True)
    assert _part(up_to=1.0).works(1.0, guided=True)
