"""Every scheduler class of diffusers and every field of its config: followed as in diffusers, warned of, or refused."""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import schedulers

from sdxl_trt.engines.bundle.manifest import Scheduler, TensorSpec
from sdxl_trt.engines.engine import Array
from sdxl_trt.engines.errors import CorruptError, SourceError
from sdxl_trt.export.sources.scheduler_classes import CLASSES, FLOW
from sdxl_trt.export.sources.scheduler_config import read_scheduler
from sdxl_trt.runtime.diffusion.conditioning import Conditions
from sdxl_trt.runtime.diffusion.denoiser import Denoiser
from sdxl_trt.runtime.diffusion.samplers.registry import bind_sampler, drive, sampler_names
from sdxl_trt.runtime.diffusion.schedules.schedule import make_schedule

# diffusers' own warnings: torch tensors in np.array, the logarithm of sigma 0, deprecated names.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

DOCUMENT = Path(__file__).parents[3] / "docs" / "export.md"
SHAPE = (1, 2, 4, 4)
REQUIRED = 1e-4
"""Largest difference of the final latents from diffusers', in units of their largest value."""
ALL = sorted(name for name in dir(schedulers) if name.endswith("Scheduler"))
# Few training timesteps, since some classes compute all of them on creation; sigmas from 0.1 to 15.
PLAIN = {
    "num_train_timesteps": 100, "beta_start": 0.0085, "beta_end": 0.12, "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False,
    "skip_prk_steps": True, "original_inference_steps": 12,
}  # fmt: skip
OF_EDM = {"sigma_min": 0.02}
KARRAS, EXPONENTIAL, BETA = ({f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta"))
CLIPPED, THRESHOLDED = {"clip_sample": True}, {"thresholding": True, "sample_max_value": 2.0}
# Other values of every field, each with the other settings that it needs.
CHANGES: dict[str, list[tuple[Any, dict[str, Any]]]] = {
    "num_train_timesteps": [(90, {})],
    "beta_start": [(0.002, {})],
    "beta_end": [(0.1, {})],
    "beta_schedule": [("linear", {}), ("squaredcos_cap_v2", {})],
    "trained_betas": [(np.linspace(0.001, 0.15, 100).tolist(), {}), ([0.1] * 7, {})],
    "prediction_type": [("v_prediction", {}), ("sample", {}), ("flow_prediction", {})],
    "interpolation_type": [("log_linear", {})],
    "use_karras_sigmas": [(True, {}), (True, EXPONENTIAL)],
    "use_exponential_sigmas": [(True, {})],
    "use_beta_sigmas": [(True, {})],
    "use_lu_lambdas": [(True, {}), (True, EXPONENTIAL), (True, KARRAS)],
    "use_flow_sigmas": [(True, {})],
    "flow_shift": [(3.0, {})],
    "sigma_min": [(0.3, {}), (0.3, KARRAS), (0.3, EXPONENTIAL), (0.3, BETA)],
    "sigma_max": [(9.0, {}), (9.0, KARRAS), (9.0, EXPONENTIAL), (9.0, BETA)],
    "sigma_data": [(1.0, {}), (1.0, {"prediction_type": "v_prediction"})],
    "sigma_schedule": [("exponential", {})],
    "rho": [(5.0, {})],
    "timestep_spacing": [("trailing", {}), ("linspace", {})],
    "timestep_type": [("continuous", {}), ("continuous", {"prediction_type": "v_prediction"})],
    "steps_offset": [(0, {})],
    "rescale_betas_zero_snr": [(True, {"prediction_type": "v_prediction"})],
    "final_sigmas_type": [("sigma_min", {})],
    "clip_sample": [(True, {})],
    "clip_sample_range": [(0.5, {}), (0.5, CLIPPED)],
    "thresholding": [(True, {})],
    "dynamic_thresholding_ratio": [(0.5, {}), (0.5, THRESHOLDED)],
    "sample_max_value": [(3.0, {}), (3.0, {"thresholding": True})],
    "set_alpha_to_one": [(True, {})],
    "solver_order": [(1, {}), (3, {})],
    "solver_type": [(value, {}) for value in ("midpoint", "heun", "logrho", "bh1", "bh2")],
    "algorithm_type": [(value, {"final_sigmas_type": "sigma_min"} if value in ("dpmsolver", "sde-dpmsolver") else {})
                       for value in ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis")],
    "lower_order_final": [(False, {}), (True, {}), (False, {"solver_order": 3})],
    "euler_at_final": [(True, {})],
    "lambda_min_clipped": [(-2.0, {})],
    "variance_type": [("learned", {}), ("fixed_large", {})],
    "use_dynamic_shifting": [(True, {})],
    "time_shift_type": [("linear", {})],
    "shift_terminal": [(0.1, {})],
    "predict_x0": [(False, {})],
    "disable_corrector": [([0], {})],
    "solver_p": [({"_class_name": "DEISMultistepScheduler"}, {})],
    "noise_sampler_seed": [(3, {})],
    "original_inference_steps": [(10, {})],
    "timestep_scaling": [(0.1, {})],
    "skip_prk_steps": [(False, {})],
    "predictor_order": [(1, {})],
    "corrector_order": [(1, {})],
    "tau_func": [("t", {})],
}  # fmt: skip


ZERO_SNR = 1e-3  # DDIM's last alpha_bar is 0; it is 2^-24 here and in the other classes
LOOSER = {(name, "rescale_betas_zero_snr"): ZERO_SNR for name in CLASSES}
# With karras diffusers keeps fractional timesteps for midpoints but rounds those of the grid.
LOOSER["KDPM2AncestralDiscreteScheduler", "use_karras_sigmas"] = 1e-2


class Model:
    """A smooth function of all inputs, as an engine and as a torch function."""

    component = SimpleNamespace(input=lambda name: TensorSpec(name=name, dtype="float32", shape=("rows",)))

    def bind(self, constants: Mapping[str, Array]) -> None:
        assert constants == {}

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        sample, timestep = inputs["sample"], float(inputs["timestep"][0])
        bent = 0.5 * sample + 0.2 * sample[..., ::-1] + 0.2 * np.tanh(sample) + 0.1 * np.sin(timestep / 3)
        return {"out_sample": bent.astype(np.float32)}

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        given = {"sample": sample.numpy(), "timestep": np.array([float(timestep)])}
        return torch.from_numpy(self.infer(given)["out_sample"])


def _noises() -> Iterator[np.ndarray]:
    rng = np.random.default_rng(7)
    while True:
        yield rng.standard_normal(SHAPE).astype(np.float32)


def _start() -> np.ndarray:
    return np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)


def _ours(scheduler: Scheduler, steps: int) -> np.ndarray:
    """Return the final latents of the sampler that the bundle would record."""
    schedule, noises = make_schedule(scheduler, steps, scheduler.sampler), _noises()
    denoise = Denoiser(Model(), schedule, Conditions({}, 1.0), scheduler.prediction_type)
    x = _start() * np.float32(schedule.initial_scale)
    *_, last = drive(bind_sampler(scheduler.sampler, lambda sigma, after: next(noises))(x, schedule.sigmas), denoise)
    return last * np.float32(schedule.final_scale)


def _theirs(name: str, config: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    scheduler, noises, model = getattr(diffusers, name)(**config), _noises(), Model()
    module = inspect.getmodule(type(scheduler))
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **settings: torch.from_numpy(next(noises)))
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = lambda sigma, after: torch.from_numpy(next(noises))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x = torch.from_numpy(_start()) * scheduler.init_noise_sigma
    # As the pipelines do; TCD's own default differs.
    eta = {"eta": 0.0} if "eta" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, **eta, return_dict=False)[0]
    return x.float().numpy()


def _fields(name: str) -> dict[str, Any]:
    """Return the fields of a class's config with their defaults."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {field: each.default for field, each in parameters.items() if field != "self"}


def _plain(name: str) -> dict[str, Any]:
    usual = PLAIN | (OF_EDM if name.startswith("EDM") else {})
    return {field: usual[field] for field in _fields(name) if field in usual}


def _read(name: str, config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> tuple[Scheduler, str]:
    """Return the schedule of a config, and the warnings."""
    caplog.clear()
    return read_scheduler(config, "a folder", name), caplog.text


def _distance(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left - right).max() / max(1.0, np.abs(right).max()))


def _changes(name: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield (field, config, description) for every change of a class's config."""
    fields = _fields(name)
    for field in fields:
        for value, beside in CHANGES[field]:
            if beside.keys() <= fields.keys():
                yield field, _plain(name) | beside | {field: value}, f"{name}: {field} {value!r} beside {beside}"


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_is_followed_or_warned_of_or_refused(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, known = _plain(name), CLASSES[name]
    scheduler, logged = _read(name, plain, caplog)
    assert ("no sampler is equivalent" in logged) == bool(known.instead)
    if known.instead:
        return  # a warning has already said that the pictures differ
    assert logged == ""
    steps = (5, 20) if "lower_order_final" in _fields(name) else (5,)
    usual = {count: _theirs(name, plain, count, monkeypatch) for count in steps}
    for count, reference in usual.items():
        assert _distance(_ours(scheduler, count), reference) < REQUIRED
    moved: set[str] = set()
    for field, config, where in _changes(name):
        found = _outcome(name, config, caplog)
        if isinstance(found, str):
            assert any(stated in found for stated in (field, str(config[field]), *_beside(field))), f"{where}: {found}"
            continue
        for count in (5, 20) if field in ("lower_order_final", "euler_at_final") else (5,):
            try:
                reference = _theirs(name, config, count, monkeypatch)
            except (NotImplementedError, ValueError):  # diffusers refuses it
                continue
            distance = _distance(_ours(found, count), reference)
            assert distance < LOOSER.get((name, field), REQUIRED), f"{where}: {distance:.1e} apart, without a warning"
            moved |= {field} if _distance(reference, usual[count]) > 1e-3 else set()
    assert known.followed - moved == set(), "changes without any effect: does this test detect them?"
    assert moved <= known.followed | set(known.fixed), "has an effect, but is not listed as followed"


def _outcome(name: str, config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> Scheduler | str:
    """Return the schedule of a config, or its warnings, or its error."""
    try:
        scheduler, logged = _read(name, config, caplog)
    except (SourceError, CorruptError) as exc:
        return str(exc)
    return logged or scheduler


def _beside(field: str) -> list[str]:
    """Return the settings that change with a field, which a warning may name instead."""
    return [name for _, beside in CHANGES[field] for name in beside]


@pytest.mark.parametrize("name", [name for name in ALL if name not in CLASSES])
def test_every_other_class_is_refused_by_name(name: str) -> None:
    with pytest.raises(SourceError, match=f"^a folder: {name} .*; name the scheduler that the model was trained for"):
        read_scheduler({"_class_name": name}, "a folder")
    with pytest.raises(SourceError, match=name):
        read_scheduler({"_class_name": name}, "a folder", "EulerDiscreteScheduler")


def test_every_field_is_in_one_list() -> None:
    """Settings of a later diffusers cause a warning unless they have the default; here they must be in a list."""
    for name, known in CLASSES.items():
        lists = [known.followed & _fields(name).keys(), known.fixed.keys() & _fields(name).keys(), known.inert.keys()]
        fields = [field for each in lists for field in each]
        assert len(fields) == len(set(fields)), name
        if not known.instead:
            assert _fields(name).keys() <= set(fields), name


def test_every_class_maps_to_an_existing_sampler() -> None:
    known = {values.sampler for values in CLASSES.values()} | {"dpmpp_2m_sde"}
    assert known <= set(sampler_names())


def test_classes_that_diffusers_lacks_are_refused() -> None:
    assert not hasattr(diffusers, "DreamScheduler")
    with pytest.raises(SourceError, match="DreamScheduler is unknown, or for another kind of model"):
        read_scheduler({}, "a folder", "DreamScheduler")


@pytest.mark.parametrize(
    ("config", "sampler"),
    [
        ({"_class_name": "LCMScheduler"}, "lcm"),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "euler_ancestral"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpmpp_2m"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
        ({"_class_name": "KDPM2AncestralDiscreteScheduler"}, "dpm_2_ancestral"),
        ({}, "euler"),
    ],
)
def test_each_class_maps_to_a_sampler(config: dict[str, Any], sampler: str) -> None:
    assert read_scheduler(config, "a folder").sampler == sampler


def test_missing_settings_have_the_default_of_the_class(caplog: pytest.LogCaptureFixture) -> None:
    heun, euler = (read_scheduler({}, "a folder", f"{name}DiscreteScheduler") for name in ("Heun", "Euler"))
    assert (heun.beta_start, heun.beta_end, euler.beta_start, euler.beta_end) == (0.00085, 0.012, 0.0001, 0.02)
    assert (euler.timestep_spacing, read_scheduler({}, "a folder", "DDIMScheduler").timestep_spacing) == (
        "linspace", "leading",
    )  # fmt: skip
    assert "DDIMScheduler's clip_sample True, its default, is not followed" in caplog.text
    # diffusers drops what a config lists as defaults.
    listed = {"steps_offset": 7, "_use_default_values": ["steps_offset"]}
    assert read_scheduler(listed, "a folder").steps_offset == 0
    assert read_scheduler({"clip_sample": None, "steps_offset": None}, "a folder", "DDIMScheduler").steps_offset == 0


def test_the_index_decides_if_the_two_files_differ(caplog: pytest.LogCaptureFixture) -> None:
    """As in diffusers, which creates the class that model_index.json names from any config."""
    found = read_scheduler({"_class_name": "DDIMScheduler", "clip_sample": False}, "a folder", "LCMScheduler")
    assert (found.class_name, found.sampler) == ("LCMScheduler", "lcm")
    assert "names DDIMScheduler, but model_index.json names LCMScheduler, which is used" in caplog.text


def test_settings_of_other_classes_are_kept_for_them(caplog: pytest.LogCaptureFixture) -> None:
    """diffusers' from_config passes unknown settings on; settings that the class ignores have no effect."""
    config = {"use_karras_sigmas": True, "sigma_max": 9.0, "set_alpha_to_one": False, "rescale_betas_zero_snr": True}
    found = read_scheduler(PLAIN | config, "a folder", "EulerAncestralDiscreteScheduler")
    plain = read_scheduler(PLAIN | {"rescale_betas_zero_snr": True}, "a folder", "EulerAncestralDiscreteScheduler")
    assert caplog.text == ""
    np.testing.assert_array_equal(make_schedule(found, 6, found.sampler).sigmas,
                                  make_schedule(plain, 6, found.sampler).sigmas)  # fmt: skip
    reference = diffusers.EulerDiscreteScheduler.from_config(
        diffusers.EulerAncestralDiscreteScheduler.from_config(PLAIN | config).config
    )
    reference.set_timesteps(6)
    np.testing.assert_allclose(make_schedule(found, 6, "euler").sigmas, reference.sigmas, rtol=2e-5)
    assert not read_scheduler(PLAIN | config, "a folder", "HeunDiscreteScheduler").rescale_betas_zero_snr


def test_sigma_min_and_max_are_read_as_in_diffusers() -> None:
    """In every class, even without such a field: all but two read them from the whole config."""
    for name in ("Heun", "KDPM2", "LMS"):
        for flag in (KARRAS, EXPONENTIAL, BETA):
            config = PLAIN | flag | {"sigma_min": 0.3, "sigma_max": 9.0}
            found = read_scheduler(config, "a folder", f"{name}DiscreteScheduler")
            reference = getattr(diffusers, f"{name}DiscreteScheduler").from_config(config)
            reference.set_timesteps(5)
            theirs = [*(reference.sigmas if name == "LMS" else reference.sigmas[::2])[:5], 0.0]
            np.testing.assert_allclose(make_schedule(found, 5, found.sampler).sigmas, theirs, rtol=2e-5)


def test_a_warning_names_field_value_and_what_is_done_instead(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_scheduler({"solver_order": 3}, "a folder", "DPMSolverMultistepScheduler")
        read_scheduler({"original_inference_steps": 250}, "another", "LCMScheduler")
    line, other = caplog.messages
    assert other.startswith("another: LCMScheduler with original_inference_steps 250 of 1000 training timesteps leave")
    assert line.startswith("a folder: DPMSolverMultistepScheduler's solver_order 3 is not followed: pictures are made ")
    assert line.endswith("with 2, and differ")


def _row(name: str) -> str:
    """Return the row of docs/export.md for a class: its sampler, and the settings that cause a warning."""
    known = CLASSES[name]
    fields = _fields(name)
    others = [field for field in known.fixed if field in fields and field != FLOW]
    warned = "always: " + known.instead if known.instead else ", ".join(f"`{field}`" for field in sorted(others)) or "–"
    sampler = "`dpmpp_2m`; sde algorithm: `dpmpp_2m_sde`" if "algorithm_type" in others else f"`{known.sampler}`"
    sampler = f"`{known.sampler}`" if known.sampler != "dpmpp_2m" or known.instead else sampler
    return f"| {name.removesuffix('Scheduler')} | {sampler} | {warned} |"


def test_the_table_in_the_docs_matches_the_code() -> None:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line in {_row(name) for name in CLASSES}] == [_row(name) for name in CLASSES]
