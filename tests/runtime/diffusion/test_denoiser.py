"""One function from noisy latents to clean ones: scaling, guidance, timesteps, dtypes."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from sdxl_trt.engines.bundle.manifest import Scheduler, TensorSpec
from sdxl_trt.engines.engine import Array
from sdxl_trt.engines.errors import CorruptError, UsageError
from sdxl_trt.runtime.diffusion.conditioning import Conditions
from sdxl_trt.runtime.diffusion.denoiser import Denoiser
from sdxl_trt.runtime.diffusion.guidance import Guidance, guided_span
from sdxl_trt.runtime.diffusion.schedules.schedule import Schedule, make_schedule


class RecordingEngine:
    """Records its inputs; returns 3 for positive rows and 1 for negative rows, or `answer` for all."""

    def __init__(self, dtype: str = "float32", answer: float | None = None) -> None:
        self.component = SimpleNamespace(input=lambda name: TensorSpec(name=name, dtype=dtype, shape=("rows",)))
        self.answer = answer
        self.bound: list[Mapping[str, Array]] = []
        self.given: list[Mapping[str, Array]] = []

    def bind(self, constants: Mapping[str, Array]) -> None:
        self.bound.append(constants)

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        self.given.append(inputs)
        result = np.full_like(inputs["sample"], 3 if self.answer is None else self.answer)
        if self.answer is None:
            result[2:] = 1
        return {"out_sample": result}


@pytest.fixture
def schedule() -> Schedule:
    return make_schedule(Scheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1), 10)


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((2, 4, 8, 8)).astype(np.float32) * 5


def test_conditions_are_bound_once(schedule: Schedule, x: np.ndarray) -> None:
    engine, constants = RecordingEngine(), {"text_embeds": np.ones((2, 3), np.float32)}
    denoise = Denoiser(engine, schedule, Conditions(constants, 1.0), "epsilon")
    for sigma in schedule.sigmas[:3]:
        denoise(x, float(sigma))
    assert engine.bound == [constants]
    assert [sorted(given) for given in engine.given] == [["sample", "timestep"]] * 3


@pytest.mark.parametrize("scale", [1.0, 0.0, 5.0, 7.5, 1.001])
def test_guidance_moves_away_from_the_negative_prediction(schedule: Schedule, x: np.ndarray, scale: float) -> None:
    engine = RecordingEngine()
    denoised = Denoiser(engine, schedule, Conditions({}, scale), "sample")(x, float(schedule.sigmas[0]))
    guided = scale > 1
    assert engine.given[0]["sample"].shape[0] == (4 if guided else 2)
    np.testing.assert_allclose(denoised, 1 + scale * 2 if guided else 3, rtol=1e-6)
    assert denoised.shape == x.shape


def test_steps_outside_the_interval_run_one_row_per_picture(schedule: Schedule, x: np.ndarray) -> None:
    engine, sigmas = RecordingEngine(), schedule.sigmas
    guidance = Guidance(5.0, 0.0, *guided_span(sigmas, 0.2, 0.4))
    denoise = Denoiser(engine, schedule, Conditions({}, 5.0), "sample", guidance)
    values = [float(denoise(x, float(sigma)).mean()) for sigma in sigmas[:-1]]
    assert [len(given["sample"]) for given in engine.given] == [2, 2, 4, 4, 2, 2, 2, 2, 2, 2]
    np.testing.assert_allclose(values, [3, 3, 11, 11, 3, 3, 3, 3, 3, 3], rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_a_call_with_too_few_pictures_is_padded(schedule: Schedule, x: np.ndarray, scale: float) -> None:
    engine, full = RecordingEngine(answer=2.0), RecordingEngine(answer=2.0)
    sigma = float(schedule.sigmas[0])
    denoised = Denoiser(engine, schedule, Conditions({}, scale, 5), "epsilon")(x, sigma)
    sample, rows = engine.given[0]["sample"], 10 if scale > 1 else 5
    assert (len(sample), len(engine.given[0]["timestep"])) == (rows, rows)
    np.testing.assert_array_equal(sample[2:5], np.repeat(sample[1:2], 3, axis=0))
    np.testing.assert_array_equal(denoised, Denoiser(full, schedule, Conditions({}, scale, 2), "epsilon")(x, sigma))


def test_positive_and_negative_rows_have_the_same_scaled_latents(schedule: Schedule, x: np.ndarray) -> None:
    engine, sigma = RecordingEngine(), float(schedule.sigmas[4])
    Denoiser(engine, schedule, Conditions({}, 5.0), "epsilon")(x, sigma)
    given = engine.given[0]
    np.testing.assert_array_equal(given["sample"][:2], given["sample"][2:])
    np.testing.assert_allclose(given["sample"][:2], x / (sigma**2 + 1) ** 0.5, rtol=1e-6)
    assert given["timestep"].dtype == np.float32
    assert given["timestep"].tolist() == [float(schedule.timesteps[4])] * 4


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_engine_gets_its_dtype_and_the_sampler_float32(schedule: Schedule, x: np.ndarray, dtype: str) -> None:
    engine = RecordingEngine(dtype)
    denoised = Denoiser(engine, schedule, Conditions({}, 5.0), "epsilon")(x, float(schedule.sigmas[0]))
    assert engine.given[0]["sample"].dtype == np.dtype(dtype)
    assert engine.given[0]["timestep"].dtype == np.float32, "fp16 timesteps are wrong above 512"
    assert denoised.dtype == np.float32


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_right_prediction_gives_clean_latents(schedule: Schedule, rng: np.random.Generator, prediction: str) -> None:
    """x = clean + sigma * noise; the model predicts what each parametrization defines (arXiv 2202.00512)."""
    clean, noise = (rng.standard_normal((1, 4, 8, 8)).astype(np.float32) for _ in range(2))
    for sigma in schedule.sigmas[:-1]:
        alpha, spread = 1 / np.sqrt(sigma**2 + 1), sigma / np.sqrt(sigma**2 + 1)
        right = {"epsilon": noise, "v_prediction": alpha * noise - spread * clean, "sample": clean}[prediction]
        engine = RecordingEngine()
        engine.infer = lambda inputs, outputs=None, right=right: {"out_sample": right.copy()}  # type: ignore[method-assign]
        denoised = Denoiser(engine, schedule, Conditions({}, 1.0), prediction)(clean + sigma * noise, float(sigma))
        np.testing.assert_allclose(denoised, clean, atol=2e-5)


@pytest.mark.parametrize("answer", [np.nan, np.inf, -np.inf])
def test_nan_is_an_error_and_not_a_black_picture(schedule: Schedule, x: np.ndarray, answer: float) -> None:
    denoise = Denoiser(RecordingEngine(answer=answer), schedule, Conditions({}, 5.0), "epsilon")
    with pytest.raises(CorruptError, match=rf"NaN or infinity at timestep {schedule.timesteps[0]:g}.*--fp32"):
        denoise(x, float(schedule.sigmas[0]))


def test_an_unknown_prediction_type_names_the_known_ones(schedule: Schedule) -> None:
    with pytest.raises(UsageError, match="'flow' is unknown; choose one of: epsilon, v_prediction, sample"):
        Denoiser(RecordingEngine(), schedule, Conditions({}, 1.0), "flow")


def test_the_latents_are_not_changed(schedule: Schedule, x: np.ndarray) -> None:
    before = x.copy()
    Denoiser(RecordingEngine(), schedule, Conditions({}, 5.0), "epsilon")(x, float(schedule.sigmas[0]))
    np.testing.assert_array_equal(x, before)
