"""Where a picture comes in: diffusers' get_timesteps and ComfyUI's set_steps, and what is refused."""

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.bundle.manifest import Scheduler
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.diffusion.schedules.schedule import make_comfyui_schedule, make_schedule
from sdxl_trt.runtime.request import Request
from sdxl_trt.runtime.request.handoff import StageRanges, StepRange, split_steps
from sdxl_trt.runtime.request.strength import first_step, grid_steps, settled_strength

SDXL = Scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
                 steps_offset=1)  # fmt: skip


@pytest.fixture(scope="module")
def get_timesteps() -> Any:
    """diffusers' own rule, on a scheduler whose timesteps are their numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import StableDiffusionXLImg2ImgPipeline

    def first(steps: int, strength: float) -> int:
        scheduler = SimpleNamespace(timesteps=np.arange(steps), order=1)
        timesteps, _ = StableDiffusionXLImg2ImgPipeline.get_timesteps(
            SimpleNamespace(scheduler=scheduler), steps, strength, "cpu"
        )
        return int(timesteps[0]) if len(timesteps) else steps

    return first


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 200), st.one_of(st.floats(1e-3, 1.0), st.integers(1, 100).map(lambda hundredth: hundredth / 100)))
def test_the_first_step_is_diffusers(get_timesteps: Any, steps: int, strength: float) -> None:
    expected = get_timesteps(steps, strength)
    if expected < steps:
        assert first_step(steps, strength) == expected
        return
    with pytest.raises(UsageError, match="less than one of them; choose at least") as caught:
        first_step(steps, strength)
    least = float(str(caught.value).partition("at least ")[2].partition(",")[0])
    assert first_step(steps, least) == steps - 1, "the remedy is one"


def test_a_usual_strength_is_not_called_an_option() -> None:
    with pytest.raises(
        UsageError, match=r"^--steps 1: the usual strength of 0\.9999 leaves none of them; give --strength 1"
    ):
        first_step(1, 0.9999, stated=False)


@pytest.mark.parametrize("sampler", ["euler", "dpm_2"])
@pytest.mark.parametrize(("steps", "strength"), [(20, 0.5), (20, 0.3), (7, 0.8), (1, 0.25)])
def test_comfyui_takes_all_steps_of_a_longer_grid_s_end(sampler: str, steps: int, strength: float) -> None:
    longer = make_comfyui_schedule(SDXL, grid_steps(steps, strength, 1000), sampler)
    assert longer.steps == int(steps / strength)
    last = longer.last(steps)
    np.testing.assert_array_equal(last.sigmas, longer.sigmas[-(steps + 1) :])
    np.testing.assert_array_equal(last.timesteps, longer.timesteps[-steps:])
    assert last.initial_scale == last.sigmas[0] < longer.initial_scale
    assert grid_steps(steps, 0.99995, 1000) == steps, "ComfyUI's own bound"
    assert longer.last(longer.steps) is longer


def test_a_grid_of_thousands_is_refused_with_the_least_strength() -> None:
    with pytest.raises(UsageError, match=r"--strength 0.001 with 20 steps takes a grid of 20000; .* at least 0.02"):
        grid_steps(20, 0.001, 1000)
    assert grid_steps(20, 0.02, 1000) == 1000
    assert grid_steps(20, 1e-300, 10**10) == 10**9, "no overflow"


def test_the_strength_is_settled_once() -> None:
    def settled(strength: float | None, start: int = 0, *, picture: bool = True, comfyui: bool = False) -> float:
        return settled_strength(strength, start, picture=picture, comfyui=comfyui)

    assert (settled(None), settled(None, 5), settled(None, picture=False)) == (0.3, 1.0, 1.0)
    assert (settled(1.0, 5), settled(0.4), settled(0.4, picture=False, comfyui=True)) == (1.0, 0.4, 0.4)
    for strength in (0.0, -0.1, 1.1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="choose above 0"):
            settled(strength)
    with pytest.raises(UsageError, match="the same thing"):
        settled(0.5, 5)
    with pytest.raises(UsageError, match="give it with --image or --refine"):
        settled(0.5, picture=False)


SCHEDULE = make_schedule(SDXL, 30)


def _cuts(begin: int, *, refiner: bool = True, **asked: Any) -> StageRanges:
    return split_steps(Request(**asked), SCHEDULE, refiner=refiner, picture=begin)


def test_a_picture_comes_in_on_the_way() -> None:
    assert _cuts(10) == StageRanges(StepRange(10, 23, add_noise=True), StepRange(23, 30, leftover_noise=False))
    assert _cuts(10, handoff=None).base == StepRange(10, 30, add_noise=True, leftover_noise=False)
    assert _cuts(10, refiner=False).refiner is None
    assert _cuts(10, handoff_step=12).base == StepRange(10, 12, add_noise=True)


def test_behind_the_handoff_the_refiner_takes_it(caplog: Any) -> None:
    refiner = StepRange(25, 30, leftover_noise=False)
    alone = StageRanges(StepRange(25, 25), refiner, first=StepRange(25, 30, add_noise=True, leftover_noise=False))
    assert _cuts(25) == alone
    assert "the refiner alone changes it" in caplog.text
    caplog.clear()
    assert _cuts(25, refine=True) == alone
    assert caplog.records == []
    # Ends of its own are ComfyUI's, and taken as they are.
    assert _cuts(25, base_end_step=23, refiner_start_step=23).first is None


def test_refine_leaves_no_word_to_the_base() -> None:
    with pytest.raises(UsageError, match="the bundle has none; use --image"):
        _cuts(25, refiner=False, refine=True)
    for option, asked in (("--no-refiner", {"handoff": None}), ("--handoff-step", {"handoff_step": 3}),
                          ("--base-end-step", {"base_end_step": 3})):  # fmt: skip
        with pytest.raises(UsageError, match=f"leave {option} out"):
            _cuts(25, refine=True, **asked)
