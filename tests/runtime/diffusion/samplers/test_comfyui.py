"""ComfyUI's samplers, noise and KSampler fields, against recorded runs of ComfyUI itself (tests/comfyui)."""

import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from sdxl_trt.engines.bundle.manifest import Manifest, Scheduler, Stage, TensorSpec, Vae
from sdxl_trt.engines.engine import Array
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.diffusion.noise.sources import BatchNoise
from sdxl_trt.runtime.diffusion.samplers.registry import (
    BROWNIAN,
    COMFYUI,
    COMFYUI_STOCHASTIC,
    SAMPLERS,
    bind_sampler,
    drive,
)
from sdxl_trt.runtime.pipeline.pipeline import Pipeline
from sdxl_trt.runtime.pipeline.run import Step
from sdxl_trt.runtime.request.request import Request
from sdxl_trt.runtime.request.resolve import resolve_request
from sdxl_trt.runtime.text.encoder import PromptEmbeds

RECORDED = Path(__file__).parents[3] / "comfyui"
REQUIRED = 1e-5
"""Of the spread of the latents."""
CASES: list[dict[str, Any]] = json.loads((RECORDED / "samplers.json").read_bytes())
STEPS: dict[str, np.ndarray] = dict(np.load(RECORDED / "steps.npz"))


class Analytic:
    """The UNet that ComfyUI's runs were recorded with: a formula of latents, timestep and mean of the conditioning."""

    def __init__(self) -> None:
        spec = TensorSpec(name="x", dtype="float32", shape=("rows",))
        self.component = SimpleNamespace(input=lambda _name: spec)

    def bind(self, constants: Mapping[str, Array]) -> None:
        self._means = constants["encoder_hidden_states"].mean(axis=(1, 2)).reshape(-1, 1, 1, 1).astype(np.float32)

    def infer(self, inputs: Mapping[str, Array], _outputs: Sequence[str] | None = None) -> dict[str, Array]:
        waves = np.sin(np.float32(0.011) * inputs["timestep"]).reshape(-1, 1, 1, 1)
        answer = np.float32(0.8) * np.tanh(np.float32(0.9) * inputs["sample"]) + np.float32(0.3) * waves
        return {"out_sample": answer + self._means}


def _manifest(model: str) -> Manifest:
    scheduler = Scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                          prediction_type="epsilon" if model == "eps" else "v_prediction",
                          rescale_betas_zero_snr=model == "vzsnr")  # fmt: skip
    vae = Vae(decoder="v", encoder=None, scaling_factor=0.13025, latent_channels=4, factor=8)
    stage = Stage(unet="u", text_encoders=(), vae=vae, scheduler=scheduler, time_ids=(), sample_size=4,
                  size_multiple=8, force_zeros_for_empty_prompt=True)  # fmt: skip
    return Manifest(format="f", format_version=1, generator="g", precision="fp32", components={}, tokenizers={},
                    base=stage)  # fmt: skip


def _embeds(value: float) -> PromptEmbeds:
    return PromptEmbeds(np.full((77, 8), value, np.float32), np.zeros(4, np.float32))


def _steps(case: dict[str, Any]) -> tuple[Any, Iterator[Step]]:
    """Return the job of a recorded case, and an iterator of its steps in the pipeline itself."""
    manifest = _manifest(case["model"])
    bundle = SimpleNamespace(manifest=manifest)
    pool: Any = SimpleNamespace(
        bundle=bundle, limits=None, phase=lambda *_, **__: [Analytic()], check=lambda _: None, computes=None
    )
    count, _, height, width = case["shape"]
    fields = {"base_start_step": case["start"], "base_end_step": case["last"], "strength": case["denoise"]}
    request = Request(
        compat="comfyui", negative="", steps=case["steps"], guidance=case["cfg"], sampler=case["sampler"], count=count,
        schedule=case["scheduler"], seed=case["seed"], width=8 * width, height=8 * height, handoff=None,
        base_add_noise=case["add_noise"], leftover_noise=case["leftover"],
        **{name: value for name, value in fields.items() if value is not None},
    )  # fmt: skip
    pipeline = Pipeline(pool)
    job = pipeline.start(request)
    job.embeds["base"] = _embeds(0.2), _embeds(-0.1)
    return job, pipeline.base(job)


def _off(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest error of `found`, relative to the spread, or to the size if all values are the same."""
    spread, size = float(expected.std()), float(np.abs(expected).max())
    return float(np.abs(found - expected).max()) / (spread if spread > 1e-3 * size else size)


def _required(case: dict[str, Any]) -> float:
    if case["model"] == "vzsnr":
        # ComfyUI's Euler step subtracts numbers of the size of sigma, 4518 here, in float32.
        return 2e-3
    if case["sampler"] == "dpmpp_2s_ancestral":
        # A middle sigma half-way between two timesteps; torch's square root is not the nearest float32.
        return 5e-5
    # The guidance scale multiplies the float32 rounding error of the difference of both sides.
    return REQUIRED if case["cfg"] < 10 else 1e-4


def _recorded() -> dict[str, list[tuple[dict[str, Any], np.ndarray]]]:
    values = np.load(RECORDED / "samplers.npz")["values"]
    groups = defaultdict(list)
    for case in CASES:
        expected = values[case["offset"] :][: int(np.prod(case["shape"]))].reshape(case["shape"])
        groups[case["group"]].append((case, expected))
    return dict(groups)


GROUPS = _recorded()


@pytest.mark.parametrize("group", GROUPS)
def test_latents_are_comfyuis(group: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    measured = []
    for case, expected in GROUPS[group]:
        if not np.isfinite(expected).all():
            with pytest.raises(UsageError, match="--steps 1: choose 2 to 1000 with --schedule kl_optimal"):
                _steps(case)
            continue
        job, steps = _steps(case)
        list(steps)
        measured.append((_off(job.latents, expected), case))
    brownian = [off for off, case in measured if case["sampler"] in BROWNIAN]
    # A path changes by the square root of the change of a sigma, if ours differs from torch's in the last bit.
    assert max(brownian, default=0.0) < 1e-3
    assert sum(off > REQUIRED for off in brownian) <= 0.1 * len(brownian)
    far = [(off, case) for off, case in measured if case["sampler"] not in BROWNIAN and not off <= _required(case)]
    assert far == []


NAMES = sorted({name.rsplit("_", 1)[0] for name in STEPS if name != "noise"})


@pytest.mark.parametrize("name", NAMES)
def test_step_by_step(name: str) -> None:
    """8 steps of `karras`: the latents before each step, the model's estimates, and the last latents."""
    case = GROUPS["seed"][0][0] | {"seed": 5, "steps": 8, "sampler": name, "scheduler": "karras"}
    job, steps = _steps(case)
    trail: list[np.ndarray] = [job.latents.copy()]
    estimates = []
    for step in steps:
        if step.latents is not None and step.denoised is not None:
            trail.append(step.latents.copy())
            estimates.append(step.denoised.copy())
    assert _off(trail[-1], STEPS[f"{name}_final"]) < REQUIRED
    # ComfyUI's callback gets DEIS's first latents in every step, and UniPC's in another scale.
    if name != "deis" and not name.startswith("uni_pc"):
        assert [_off(*pair) < REQUIRED for pair in zip(trail, STEPS[f"{name}_x"], strict=False)] == [True] * 8
    # With two estimates in a step, its callback gets the first, and ours the last.
    if not name.startswith(("dpm_2", "dpmpp_2s")):
        assert [_off(*pair) < REQUIRED for pair in zip(estimates, STEPS[f"{name}_denoised"], strict=True)] == [True] * 8


def test_noise_is_comfyuis() -> None:
    values = np.load(RECORDED / "noise.npz")["values"]
    for case in json.loads((RECORDED / "noise.json").read_bytes()):
        expected = values[case["offset"] :][: int(np.prod(case["shape"]))].reshape(case["shape"])
        found = BatchNoise(case["seed"], case["shape"][0]).draw(tuple(case["shape"][1:]))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_every_sampler_has_recorded_runs() -> None:
    assert {*SAMPLERS, *COMFYUI, *COMFYUI_STOCHASTIC} <= {case["sampler"] for case in CASES}


def test_a_single_step_of_uni_pc_runs_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    single = next(case for case, _ in GROUPS["few"] if case["sampler"] == "uni_pc" and case["steps"] == 1)
    _steps(single)
    assert "uni_pc with a single step leaves the noise as it is" in caplog.text
    caplog.clear()
    _steps(single | {"steps": 2})
    assert caplog.records == []


def test_each_expert_has_its_own_grid() -> None:
    """A base with zero terminal SNR hands over to a refiner that was trained on the usual sigmas."""
    zero, usual = _manifest("vzsnr"), _manifest("eps")
    pair = msgspec.structs.replace(zero, refiner=usual.base)
    request = Request(compat="comfyui", steps=10, width=32, height=32, schedule="karras")
    both, alone = resolve_request(replace(request, handoff_step=6), pair), resolve_request(request, usual)
    assert both.schedule.sigmas[0] > 4000
    np.testing.assert_array_equal(both.refiner_schedule.sigmas, alone.schedule.sigmas)
    assert (both.cut, both.base.stop, both.denoising_of("refiner")[1].start) == (6, 6, 6)


@pytest.mark.parametrize("name", [name for name in COMFYUI if name in SAMPLERS])
def test_comfyuis_samplers_differ_from_diffusers(name: str) -> None:
    def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
        return np.tanh(x / np.float32(1 + sigma**2)) + np.float32(0.1) * np.sin(x)

    def no_noise(_sigma: float, _after: float) -> np.ndarray:
        raise AssertionError("a deterministic sampler draws noise")

    sigmas, start = np.array([14.6, 5.0, 2.0, 0.9, 0.4, 0.1, 0.0], np.float32), STEPS["noise"] * np.float32(14.6)
    ends = [
        list(drive(bind_sampler(name, no_noise, comfyui=flag)(start, sigmas), denoise))[-1] for flag in (False, True)
    ]
    assert np.abs(ends[0] - ends[1]).max() > (0.0 if name == "dpm_2" else 1e-4)


@pytest.mark.parametrize(("sampler", "refiner"), [("euler", "dpm_2"), ("uni_pc", "euler"), ("dpm_2", "dpm_2")])
def test_a_refiners_sampler_of_another_kind_has_its_own_grid(sampler: str, refiner: str) -> None:
    usual = _manifest("eps")
    pair = msgspec.structs.replace(usual, refiner=usual.base)
    request = Request(compat="comfyui", steps=10, width=32, height=32, schedule="beta", sampler=sampler)
    both = resolve_request(replace(request, refiner_sampler=refiner, handoff_step=6), pair)
    for sigmas, name in ((both.schedule.sigmas, sampler), (both.refiner_schedule.sigmas, refiner)):
        np.testing.assert_array_equal(sigmas, resolve_request(replace(request, sampler=name), usual).schedule.sigmas)
    assert (both.refiner_schedule is both.schedule) == (sampler == refiner)
