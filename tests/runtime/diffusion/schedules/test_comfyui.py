"""ComfyUI's tables and its nine schedules, against recorded results of ComfyUI itself (tests/comfyui)."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines.bundle.manifest import Scheduler
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.diffusion.schedules.comfyui import COMFYUI_SCHEDULES, DISCARDING
from sdxl_trt.runtime.diffusion.schedules.schedule import make_comfyui_schedule
from sdxl_trt.runtime.diffusion.schedules.training import comfyui_log_sigmas, comfyui_training_sigmas

SDXL = Scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
RECORDED = Path(__file__).parents[3] / "comfyui"
REQUIRED = 1.3e-7
"""Relative: a unit in the last place of float32, the error of torch's own functions."""
UNDECIDED = {("eps", "normal", False, 75)}
"""The grids in which one sigma half-way between two timesteps gets the other one."""


def _recorded() -> dict[str, list[tuple[dict[str, Any], np.ndarray]]]:
    values = np.load(RECORDED / "schedules.npz")["values"]
    grids = defaultdict(list)
    for case in json.loads((RECORDED / "schedules.json").read_bytes()):
        grids[case["scheduler"]].append((case, values[case["offset"] :][: case["shape"][0]]))
    return dict(grids)


GRIDS = _recorded()


@pytest.mark.parametrize("table", ["eps", "zsnr"])
def test_tables_are_comfyuis_bit_for_bit(table: str) -> None:
    with np.load(RECORDED / "tables.npz") as recorded:
        zero = table == "zsnr"
        sigmas, logs = (make(SDXL, zero_terminal_snr=zero) for make in (comfyui_training_sigmas, comfyui_log_sigmas))
        np.testing.assert_array_equal(sigmas, recorded[f"{table}_table"])
        np.testing.assert_array_equal(logs, recorded[f"{table}_log_table"])


@pytest.mark.parametrize("schedule", COMFYUI_SCHEDULES)
def test_sigmas_and_timesteps_are_comfyuis(schedule: str) -> None:
    for case, expected in GRIDS[schedule]:
        sampler, zero = "dpm_2" if case["leaves_out_last"] else "euler", case["table"] == "zsnr"
        if np.isnan(expected).any():
            with pytest.raises(UsageError, match="--steps 1: choose 2 to 1000 with --schedule kl_optimal"):
                make_comfyui_schedule(SDXL, case["steps"], sampler, schedule, zero_terminal_snr=zero)
            continue
        found = make_comfyui_schedule(SDXL, case["steps"], sampler, schedule, zero_terminal_snr=zero)
        np.testing.assert_allclose(found.sigmas, expected, rtol=REQUIRED, atol=0)
        off = np.flatnonzero(found.timesteps != case["timesteps"])
        if (case["table"], schedule, case["leaves_out_last"], case["steps"]) in UNDECIDED:
            assert len(off) == 1
        else:
            assert len(off) == 0, (case["steps"], off)


def test_published_sigmas() -> None:
    """Index 20 of 25 steps, from the design."""
    found = {name: float(make_comfyui_schedule(SDXL, 25, schedule=name).sigmas[20]) for name in COMFYUI_SCHEDULES}
    assert found["normal"] == pytest.approx(0.4936, abs=5e-5)
    assert found["sgm_uniform"] == pytest.approx(0.5712, abs=5e-5)
    assert found["simple"] == pytest.approx(0.5693, abs=5e-5)


def test_all_nine_schedules_exist_in_comfyuis_order() -> None:
    assert list(COMFYUI_SCHEDULES) == [
        "simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal", "linear_quadratic",
        "kl_optimal",
    ]  # fmt: skip
    assert set(GRIDS) == set(COMFYUI_SCHEDULES)


@pytest.mark.parametrize("schedule", COMFYUI_SCHEDULES)
def test_some_samplers_make_one_step_more_and_drop_the_last_sigma(schedule: str) -> None:
    for sampler in DISCARDING:
        more = make_comfyui_schedule(SDXL, 21, schedule=schedule).sigmas
        found = make_comfyui_schedule(SDXL, 20, sampler, schedule).sigmas
        np.testing.assert_array_equal(found, [*more[:-2], 0.0])


@pytest.mark.parametrize("schedule", COMFYUI_SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 999, 1000])
def test_any_number_of_steps_falls_to_0(schedule: str, steps: int) -> None:
    if (schedule, steps) == ("kl_optimal", 1):
        return
    found = make_comfyui_schedule(SDXL, steps, schedule=schedule)
    assert (np.diff(found.sigmas) < 0).all()
    assert found.sigmas[-1] == 0
    assert found.steps == len(found.sigmas) - 1
    if schedule not in {"ddim_uniform", "beta"}:
        assert found.steps == steps


def test_ddim_uniform_and_beta_may_differ_from_the_requested_steps() -> None:
    assert make_comfyui_schedule(SDXL, 30, schedule="ddim_uniform").steps == 31
    assert make_comfyui_schedule(SDXL, 1000, schedule="beta").steps < 1000


def test_errors_name_the_possible_schedules_and_steps() -> None:
    with pytest.raises(UsageError, match="--schedule 'leading' is unknown; choose one of: simple, sgm_uniform"):
        make_comfyui_schedule(SDXL, 20, schedule="leading")
    with pytest.raises(UsageError, match="--steps 1000: choose 1 to 999"):
        make_comfyui_schedule(SDXL, 1000, "dpm_2")
    with pytest.raises(UsageError, match="--steps 0: choose 1 to 1000"):
        make_comfyui_schedule(SDXL, 0)
