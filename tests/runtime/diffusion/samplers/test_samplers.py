"""Properties of every sampler: restart at a cut, end, memory ownership; and Euler through the real Denoiser."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.bundle.manifest import Scheduler, TensorSpec
from sdxl_trt.engines.engine import Array
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.diffusion.conditioning import Conditions
from sdxl_trt.runtime.diffusion.denoiser import Denoiser
from sdxl_trt.runtime.diffusion.samplers.registry import (
    COMFYUI,
    COMFYUI_STOCHASTIC,
    SAMPLERS,
    STOCHASTIC,
    TWO_CALLS,
    bind_sampler,
    drive,
    euler,
    sampler_names,
)
from sdxl_trt.runtime.diffusion.schedules.diffusers import FAMILIES
from sdxl_trt.runtime.diffusion.schedules.schedule import make_schedule

# diffusers' own warning: it passes torch tensors to np.array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SHAPE = (2, 4, 8, 8)
OTHERS = [*COMFYUI, *(name for name, ours in STOCHASTIC.items() if COMFYUI_STOCHASTIC[name] is not ours)]
ALL = [(name, False) for name in sampler_names()] + [(name, True) for name in OTHERS]
MULTISTEP = {"lms", "dpmpp_2m", "res_multistep", "deis", "uni_pc", "dpmpp_2m_sde", "dpmpp_3m_sde", "uni_pc_bh2"}
# ComfyUI's UniPC ends at sigma 0.001.
ENDS_NEAR = {("uni_pc", True): 2e-3, ("uni_pc_bh2", True): 2e-3}


def _noise(shape: tuple[int, ...] = SHAPE, seed: int = 5) -> Callable[[float, float], np.ndarray]:
    """Return noise that depends only on its sigmas, so that a part of a grid draws the same as the whole."""
    return lambda sigma, after: np.random.default_rng([seed, int(sigma * 1e6), int(after * 1e6)]).standard_normal(
        shape, dtype=np.float32
    )


def _model(sample: Any, timestep: float) -> Any:
    """Return a function of all inputs, in numpy and in torch."""
    turned = sample[..., ::-1] if isinstance(sample, np.ndarray) else sample.flip(-1)
    return 0.6 * sample + 0.2 * turned + 0.1 * float(np.sin(timestep / 77))


def _denoise(x: np.ndarray, sigma: float) -> np.ndarray:
    """Denoise as for normally distributed latents, with a nonlinearity."""
    return np.tanh(x / np.float32(1 + sigma**2)) + np.float32(0.1) * np.sin(x[..., ::-1])


class ModelEngine:
    """An engine that computes `_model`."""

    component = SimpleNamespace(input=lambda name: TensorSpec(name=name, dtype="float32", shape=("rows",)))

    def bind(self, constants: Mapping[str, Array]) -> None:
        self.constants = constants

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        timestep = inputs["timestep"]
        assert (timestep == timestep[0]).all()
        return {"out_sample": _model(inputs["sample"], float(timestep[0])).astype(np.float32)}


def _diffusers(config: dict[str, Any], steps: int, noise: np.ndarray) -> list[np.ndarray]:
    """Return the latents before the first step and after each one in diffusers."""
    scheduler = EulerDiscreteScheduler(**config)
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(noise) * scheduler.init_noise_sigma
    trail = [x.numpy()]
    for t in scheduler.timesteps:
        prediction = _model(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(prediction, t, x, return_dict=False)[0]
        trail.append(x.numpy())
    return trail


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_euler_is_diffusers_step_by_step(prediction: str, spacing: str, steps: int, rng: np.random.Generator) -> None:
    config = SDXL | {"prediction_type": prediction, "timestep_spacing": spacing}
    noise = rng.standard_normal(SHAPE).astype(np.float32)
    schedule = make_schedule(Scheduler(**config), steps)
    denoise = Denoiser(ModelEngine(), schedule, Conditions({}, 1.0), prediction)
    start = noise * np.float32(schedule.initial_scale)
    trail = [start, *drive(euler(start, schedule.sigmas), denoise)]
    expected = _diffusers(config, steps, noise)
    assert len(trail) == len(expected) == steps + 1
    for step, (x, reference) in enumerate(zip(trail, expected, strict=True)):
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, reference, rtol=1e-4, atol=1e-4, err_msg=f"after step {step} of {steps}")


@pytest.mark.parametrize(("name", "comfyui"), ALL)
@pytest.mark.parametrize("cut", [1, 5, 9])
def test_a_cut_restarts_multistep_samplers_and_changes_no_other(
    name: str, comfyui: bool, cut: int, rng: np.random.Generator
) -> None:
    sigmas = make_schedule(Scheduler(**SDXL, timestep_spacing="leading"), 10).sigmas
    run = bind_sampler(name, _noise(), comfyui=comfyui)
    start = rng.standard_normal(SHAPE).astype(np.float32) * sigmas[0]
    whole = list(drive(run(start, sigmas), _denoise))
    before, after = sigmas[: cut + 1], sigmas[cut:]
    first = list(drive(run(start, before), _denoise))
    both = first + list(drive(run(first[-1], after), _denoise))
    assert (len(first), len(both)) == (cut, 10)
    if name not in MULTISTEP:
        np.testing.assert_array_equal(both, whole)
        return
    one_step = next(drive(run(first[-1], after), _denoise))
    np.testing.assert_array_equal(both[cut], one_step)
    if cut < 9:
        assert np.abs(both[-1] - whole[-1]).max() > 1e-6, "a multistep sampler must restart at the cut"


@pytest.mark.parametrize(("name", "comfyui"), ALL)
def test_a_perfect_denoiser_gives_the_clean_latents(name: str, comfyui: bool, rng: np.random.Generator) -> None:
    """The last sigma is 0, so the last latents must be the estimate."""
    clean = rng.standard_normal(SHAPE).astype(np.float32)
    sigmas = make_schedule(Scheduler(**SDXL, timestep_spacing="leading"), 12).sigmas
    start = clean + rng.standard_normal(SHAPE).astype(np.float32) * sigmas[0]
    *_, last = drive(bind_sampler(name, _noise(), comfyui=comfyui)(start, sigmas), lambda x, sigma: clean)
    np.testing.assert_allclose(last, clean, atol=ENDS_NEAR.get((name, comfyui), 1e-5) * 3)


@pytest.mark.parametrize(("name", "comfyui"), ALL)
def test_a_sampler_does_not_change_its_input_and_can_be_stopped(name: str, comfyui: bool) -> None:
    calls: list[float] = []

    def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
        calls.append(sigma)
        return x * 0

    start = np.ones(SHAPE, np.float32)
    sampled = drive(bind_sampler(name, _noise(), comfyui=comfyui)(start, np.array([4, 2, 1, 0], np.float32)), denoise)
    assert calls == [], "nothing runs before the first step is requested"
    next(sampled)
    assert calls[0] == 4.0
    assert len(calls) == (2 if name in TWO_CALLS else 1)
    assert (start == 1).all()


@pytest.mark.parametrize(("name", "comfyui"), ALL)
def test_yielded_latents_and_the_models_outputs_are_not_changed(name: str, comfyui: bool) -> None:
    outputs: list[tuple[np.ndarray, np.ndarray]] = []

    def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
        answer = _denoise(x, sigma)
        outputs.append((answer, answer.copy()))
        return answer

    sigmas = np.array([9, 4, 2, 1, 0.5, 0], np.float32)
    run = bind_sampler(name, _noise(), comfyui=comfyui)
    kept = [(x, x.copy()) for x in drive(run(np.full(SHAPE, 3, np.float32), sigmas), denoise)]
    for now, then in kept + outputs:
        np.testing.assert_array_equal(now, then)


@st.composite
def _grids(draw: st.DrawFn) -> np.ndarray:
    """Return falling sigmas of one to eight steps, ending at 0 or above, some from a model with zero terminal SNR."""
    steps = draw(st.integers(1, 8))
    logs = draw(st.lists(st.floats(-3.5, 8.3), min_size=steps + 1, max_size=steps + 1, unique_by=lambda v: round(v, 2)))
    sigmas = np.exp(np.array(sorted(logs, reverse=True))).astype(np.float32)
    if draw(st.booleans()):
        sigmas[-1] = 0
    return sigmas


@settings(deadline=None, max_examples=40)
@given(sigmas=_grids(), data=st.data())
def test_any_grid_gives_finite_latents_of_the_same_shape_and_dtype(sigmas: np.ndarray, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(1, 4, 2, 2), (2, 4, 1, 3), (3, 1, 1, 1)]))
    start = np.random.default_rng(len(sigmas)).standard_normal(shape).astype(np.float32) * sigmas[0]
    for name, comfyui in ALL:
        trail = list(drive(bind_sampler(name, _noise(shape), comfyui=comfyui)(start, sigmas), _denoise))
        assert len(trail) == len(sigmas) - 1, name
        for x in trail:
            assert (x.shape, x.dtype) == (shape, np.float32), name
            assert np.isfinite(x).all(), name


@settings(deadline=None, max_examples=25)
@given(sigma=st.floats(0.03, 4096), seed=st.integers(0, 99))
def test_one_step_to_sigma_0_returns_the_models_estimate(sigma: float, seed: int) -> None:
    start = np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32) * np.float32(sigma)
    sigmas = np.array([sigma, 0], np.float32)
    for name, comfyui in ALL:
        (x,) = drive(bind_sampler(name, _noise(), comfyui=comfyui)(start, sigmas), _denoise)
        expected = _denoise(start, float(sigmas[0]))
        if comfyui and name.startswith("uni_pc"):
            # ComfyUI's takes no step before it has two estimates.
            expected = start / np.float32(math.hypot(1.0, float(sigmas[0])))
        tolerance = 0.001 / sigma * np.abs(start - expected).max() * 1.01 if (name, comfyui) in ENDS_NEAR else 0.0
        np.testing.assert_allclose(x, expected, rtol=0, atol=tolerance + 1e-6, err_msg=name)


@pytest.mark.parametrize(("name", "comfyui"), ALL)
def test_a_last_step_of_zero_length_changes_nothing(name: str, comfyui: bool) -> None:
    """diffusers' DEIS has one if a transform made the grid; `uni_pc` still corrects the step before it."""
    sigmas = np.array([9, 4, 2, 0.5, 0.5], np.float32)
    run = bind_sampler(name, _noise(), comfyui=comfyui)
    *_, before, last = drive(run(np.full(SHAPE, 3, np.float32), sigmas), _denoise)
    assert np.isfinite(last).all()
    if name not in {"lcm", "uni_pc", "uni_pc_bh2"}:
        np.testing.assert_allclose(last, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "comfyui"), ALL)
def test_an_empty_grid_has_no_step(name: str, comfyui: bool) -> None:
    run = bind_sampler(name, _noise(), comfyui=comfyui)
    assert list(drive(run(np.ones(SHAPE, np.float32), np.array([1], np.float32)), _denoise)) == []


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_is_drawn_for_the_interval_of_the_step(name: str) -> None:
    """With falling sigmas, once a step, by dpmpp_sde twice, and not for a step to sigma 0."""
    asked: list[tuple[float, float]] = []

    def noise(sigma: float, after: float) -> np.ndarray:
        asked.append((sigma, after))
        return np.zeros(SHAPE, np.float32)

    asking = STOCHASTIC[name](np.ones(SHAPE, np.float32), np.array([8, 2, 0], np.float32), noise=noise)
    list(drive(asking, _denoise))
    assert asked == ([(8.0, 4.0), (8.0, 2.0)] if name == "dpmpp_sde" else [(8.0, 2.0)])


def test_the_registry_names_sixteen_samplers_and_their_grids() -> None:
    assert sampler_names()[0] == "euler"
    assert len(sampler_names()) == 16
    assert set(sampler_names()) == set(FAMILIES)
    assert set(sampler_names(comfyui=True)) == {*FAMILIES, "uni_pc_bh2"}
    assert set(sampler_names()) >= TWO_CALLS
    assert not set(SAMPLERS) & set(STOCHASTIC)


def test_an_unknown_sampler_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown sampler 'uni_pc_bh2'; choose one of: euler, heun,"):
        bind_sampler("uni_pc_bh2", _noise())
    with pytest.raises(UsageError, match=r"choose one of: .*uni_pc_bh2"):
        bind_sampler("plms", _noise(), comfyui=True)


@pytest.mark.parametrize(("name", "comfyui"), ALL)
def test_a_caller_may_keep_writing_to_the_latents_that_it_passed(name: str, comfyui: bool) -> None:
    """The pipeline does so: the latents of all pictures are one array, and a group is a view of it."""
    sigmas = np.array([9, 4, 2, 0.5, 0], np.float32)
    start = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32) * 9
    *_, expected = drive(bind_sampler(name, _noise(), comfyui=comfyui)(start.copy(), sigmas), _denoise)
    for x in drive(bind_sampler(name, _noise(), comfyui=comfyui)(start, sigmas), _denoise):
        start[:] = x
    np.testing.assert_array_equal(start, expected)
