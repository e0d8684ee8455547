"""ComfyUI's nine schedules against golden vectors; golden/make_comfyui.py says how they were made."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.engines.manifest import Scheduler
from sdxl_trt.runtime.comfy_schedules import COMFYUI_SCHEDULES, DISCARDING
from sdxl_trt.runtime.sigmas import make_comfyui_schedule

SDXL = Scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("comfyui.json").read_text(encoding="utf-8"))
REQUIRED = 3e-6
"""Relative, for sigmas from 0.03 to 15: torch's and numpy's float32 logarithms."""


def _tie(schedule: str, step: int, steps: int) -> bool:
    """Return whether the spaced timestep lies halfway between two, where the last bit of a logarithm decides."""
    spaced = {"normal": steps - 1, "sgm_uniform": steps}
    position = 999 * (1 - step / spaced[schedule]) if schedule in spaced else 0.0
    return abs(position - np.floor(position) - 0.5) < 1e-3


@pytest.mark.parametrize("golden", GOLDEN["grids"], ids=lambda g: f"{g['schedule']}-{g['steps']}-{g['zero_snr']}")
def test_sigmas_and_timesteps(golden: dict[str, Any]) -> None:
    name, steps = golden["schedule"], golden["steps"]
    found = make_comfyui_schedule(SDXL, steps, schedule=name, zero_terminal_snr=golden["zero_snr"])
    expected = np.array(golden["sigmas"])
    assert found.sigmas.shape == expected.shape
    measured = float(np.abs(found.sigmas[:-1] / expected[:-1] - 1.0).max())
    assert measured <= REQUIRED, f"{name}, {steps} steps: measured {measured:.1e}, required {REQUIRED:.0e}"
    assert (found.sigmas[-1], expected[-1]) == (0.0, 0.0)
    for step in np.flatnonzero(found.timesteps != golden["timesteps"]):
        assert _tie(name, step, steps), f"step {step} of {name}, {steps} steps"
        assert abs(found.timesteps[step] - golden["timesteps"][step]) == 1


def test_published_sigmas() -> None:
    """Index 20 of 25 steps, from the design."""
    found = {name: float(make_comfyui_schedule(SDXL, 25, schedule=name).sigmas[20]) for name in COMFYUI_SCHEDULES}
    assert found["normal"] == pytest.approx(0.4936, abs=5e-5)
    assert found["sgm_uniform"] == pytest.approx(0.5712, abs=5e-5)
    assert found["simple"] == pytest.approx(0.5693, abs=5e-5)


def test_all_nine_are_there_in_comfyuis_order() -> None:
    assert list(COMFYUI_SCHEDULES) == [
        "simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal", "linear_quadratic",
        "kl_optimal",
    ]  # fmt: skip
    assert {golden["schedule"] for golden in GOLDEN["grids"]} == set(COMFYUI_SCHEDULES)


@pytest.mark.parametrize("schedule", COMFYUI_SCHEDULES)
def test_some_samplers_take_a_step_more_and_leave_out_the_last_sigma(schedule: str) -> None:
    for sampler in DISCARDING:
        more = make_comfyui_schedule(SDXL, 21, schedule=schedule).sigmas
        found = make_comfyui_schedule(SDXL, 20, sampler, schedule).sigmas
        np.testing.assert_array_equal(found, [*more[:-2], 0.0])


@pytest.mark.parametrize("schedule", COMFYUI_SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 999, 1000])
def test_any_number_of_steps_falls_to_0(schedule: str, steps: int) -> None:
    found = make_comfyui_schedule(SDXL, steps, schedule=schedule)
    assert (np.diff(found.sigmas) < 0).all()
    assert found.sigmas[-1] == 0
    assert found.steps == len(found.sigmas) - 1
    if schedule not in {"ddim_uniform", "beta"}:
        assert found.steps == steps


def test_ddim_uniform_and_beta_may_take_other_than_the_asked_steps() -> None:
    assert make_comfyui_schedule(SDXL, 30, schedule="ddim_uniform").steps == 31
    assert make_comfyui_schedule(SDXL, 1000, schedule="beta").steps < 1000


def test_what_cannot_be_names_what_can() -> None:
    with pytest.raises(UsageError, match="--schedule 'leading' is unknown; choose one of: simple, sgm_uniform"):
        make_comfyui_schedule(SDXL, 20, schedule="leading")
    with pytest.raises(UsageError, match="--steps 1000: choose 1 to 999"):
        make_comfyui_schedule(SDXL, 1000, "dpm_2")
    with pytest.raises(UsageError, match="--steps 0: choose 1 to 1000"):
        make_comfyui_schedule(SDXL, 0)
