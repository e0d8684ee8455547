"""Folders with all kinds of schedulers, exported and run without options, against diffusers' pipelines of them."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdxl_trt.engines.errors import SourceError, UsageError
from sdxl_trt.export import Options, export_bundle
from sdxl_trt.runtime import Request, open_bundle

# diffusers' own warnings: torch tensors passed to np.array, the logarithm of sigma 0.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("converted_once"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]

PROMPT, SEED, STEPS = "a red fox in the snow", 2**33 + 11, 8
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading",
        "steps_offset": 1}  # fmt: skip
V = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
PLAYGROUND = {"latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
              "scaling_factor": 0.5}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A scheduler class with its config, whether the refiner runs too, and the allowed difference of the latents."""

    scheduler: str
    config: dict[str, Any] = field(default_factory=dict)
    refined: bool = False
    required: float = 1e-3
    vae: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        own = {name: value for name, value in self.config.items() if SDXL.get(name) != value}
        settings = "-".join(f"{name}={str(value)[:12]}" for name, value in own.items())
        return f"{self.scheduler.removesuffix('Scheduler')}-{settings}{'-refined' if self.refined else ''}"


KARRAS, EXPONENTIAL = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}
ENDS = {"sigma_min": 0.1, "sigma_max": 8.0}
BETAS = {"trained_betas": np.linspace(0.03**0.5, 0.11**0.5, 1000, dtype=np.float32).tolist()}
CASES = [
    Case("EulerDiscreteScheduler", SDXL | KARRAS | ENDS, refined=True),
    Case("EulerDiscreteScheduler", SDXL | EXPONENTIAL | ENDS),
    Case("EulerDiscreteScheduler", SDXL | {"use_beta_sigmas": True} | ENDS),
    Case("EulerDiscreteScheduler", SDXL | {"final_sigmas_type": "sigma_min"}, refined=True),
    Case("EulerDiscreteScheduler", SDXL | {"trained_betas": np.linspace(0.001, 0.014, 1000).tolist()}),
    Case("EulerDiscreteScheduler", SDXL | V, refined=True),
    Case("EulerDiscreteScheduler", SDXL | KARRAS | {"prediction_type": "v_prediction", "timestep_type": "continuous"}),
    Case("EulerAncestralDiscreteScheduler", SDXL | {"timestep_spacing": "trailing"}, refined=True),
    Case("HeunDiscreteScheduler", SDXL | KARRAS),
    Case("KDPM2DiscreteScheduler", SDXL),
    Case("LMSDiscreteScheduler", SDXL | EXPONENTIAL),
    Case("DPMSolverMultistepScheduler", SDXL | {"use_lu_lambdas": True}, refined=True),
    Case("DPMSolverMultistepScheduler", SDXL | KARRAS | {"algorithm_type": "sde-dpmsolver++"}),
    Case("UniPCMultistepScheduler", SDXL),
    Case("UniPCMultistepScheduler", SDXL | KARRAS),
    Case("UniPCMultistepScheduler", SDXL | KARRAS | ENDS),
    Case("DEISMultistepScheduler", SDXL | EXPONENTIAL),
    Case("DDIMScheduler", SDXL | {"clip_sample": False, "set_alpha_to_one": True}, refined=True),
    Case("DDIMScheduler", SDXL | {"clip_sample": False, "set_alpha_to_one": False}),
    Case("DDPMScheduler", SDXL | {"clip_sample": False}),
    Case("LCMScheduler"),
    Case("LCMScheduler", {"original_inference_steps": 100}),
    Case("EDMEulerScheduler", vae=PLAYGROUND),
    Case("EDMEulerScheduler", {"sigma_max": 120.0, "sigma_data": 1.0, "sigma_schedule": "exponential",
                               "prediction_type": "v_prediction"}),
    Case("EDMDPMSolverMultistepScheduler", vae=PLAYGROUND),
    Case("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "rho": 5.0}),
]  # fmt: skip


def _folder(source: Path, target: Path, case: Case) -> Path:
    """Return a copy of a pipeline's folder with a case's scheduler and its changes to the autoencoder's config."""
    shutil.copytree(source, target)
    getattr(diffusers, case.scheduler)(**case.config).save_pretrained(target / "scheduler")
    index = json.loads((target / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", case.scheduler]
    (target / "model_index.json").write_text(json.dumps(index))
    vae = target / "vae" / "config.json"
    vae.write_text(json.dumps(json.loads(vae.read_text()) | case.vae))
    return target


def _theirs(base: Path, refiner: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the last latents and the pixels of diffusers' pipelines with the folders' configs."""
    settings = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": 5.0,
                "generator": torch.Generator().manual_seed(SEED), "output_type": "latent"}  # fmt: skip
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(base)
        pipeline.set_progress_bar_config(disable=True)
        end = {} if refiner is None else {"denoising_end": 0.6}
        latents = pipeline(**settings, width=32, height=32, **end).images
        if refiner is not None:
            pipeline = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner)
            pipeline.set_progress_bar_config(disable=True)
            latents = pipeline(**settings, image=latents, denoising_start=0.6).images
        config = pipeline.vae.config
        mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
        scaled = latents / config.scaling_factor
        if mean is not None:
            columns = [torch.tensor(value).view(1, -1, 1, 1) for value in (std, mean)]
            scaled = scaled * columns[0] + columns[1]
        decoded = pipeline.vae.decode(scaled, return_dict=False)[0]
        pixels = pipeline.image_processor.postprocess(decoded, output_type="np")[0]
    return latents.numpy(), np.rint(pixels * 255.0)


def _ours(bundle: Path, **settings: Any) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    request = Request(PROMPT, steps=STEPS, seed=SEED, width=32, height=32, **settings)
    with open_bundle(bundle, provider="ort-cpu") as pipeline:
        (picture,) = pipeline.generate(request)
        return pipeline.run.final, np.asarray(picture.image, np.float64), picture.metadata


def _distance(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left - right).max() / max(1.0, np.abs(right).max()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_folder_runs_as_in_diffusers(
    case: Case, pairs: Callable[[str], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    record_property: Callable[[str, Any], None],
) -> None:  # fmt: skip
    pair = pairs("outline")
    base = _folder(pair.base, tmp_path / "base", case)
    refiner = _folder(pair.refiner, tmp_path / "refiner", case) if case.refined else None
    latents, pixels = _theirs(base, refiner)
    caplog.clear()
    export_bundle(base, refiner, tmp_path / "bundle", Options(precision="fp32"))
    assert [record.getMessage() for record in caplog.records if record.name.startswith("sdxl_trt")] == []
    final, picture, metadata = _ours(tmp_path / "bundle", handoff=0.6 if case.refined else None)
    distance = _distance(final, latents)
    record_property("distance", distance)
    print(f"\n{case}: {distance:.1e}, sampler {metadata['sampler']}")
    assert distance <= case.required, f"{distance:.1e} of the largest latent apart"
    assert np.abs(picture - pixels).max() <= 1


def test_a_setting_that_is_reported_as_ignored_changes_the_result(
    pairs: Callable[[str], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DDIM clips latents by default, as for pixel models: the export warns of it, and the run does not clip."""
    case = Case("DDIMScheduler", SDXL)
    base = _folder(pairs("outline").base, tmp_path / "base", case)
    latents, _ = _theirs(base, None)
    export_bundle(base, None, tmp_path / "bundle", Options(precision="fp32"))
    assert "DDIMScheduler's clip_sample True is not followed" in caplog.text
    assert _distance(_ours(tmp_path / "bundle")[0], latents) > 0.01


def test_a_requested_sampler_overrides_the_folders(pairs: Callable[[str], Any], tmp_path: Path) -> None:
    base = _folder(pairs("outline").base, tmp_path / "base", Case("LCMScheduler"))
    export_bundle(base, None, tmp_path / "bundle", Options(precision="fp32"))
    finals = [_ours(tmp_path / "bundle", **settings) for settings in ({}, {"sampler": "lcm"}, {"sampler": "euler"})]
    assert [metadata["sampler"] for _, _, metadata in finals] == ["lcm", "lcm", "euler"]
    np.testing.assert_array_equal(finals[0][0], finals[1][0])
    assert _distance(finals[2][0], finals[0][0]) > 0.1, "the difference of a run without the folder's sampler"
    assert _ours(tmp_path / "bundle", compat="comfyui")[2]["sampler"] == "euler", "ComfyUI ignores the folder's"


def test_a_model_with_edms_schedule_has_no_handoff(pairs: Callable[[str], Any], tmp_path: Path) -> None:
    pair = pairs("outline")
    base = _folder(pair.base, tmp_path / "base", Case("EDMEulerScheduler"))
    for stages in ((base, pair.refiner), (pair.base, _folder(pair.refiner, tmp_path / "r", Case("EDMEulerScheduler")))):
        with pytest.raises(SourceError, match=r"has EDM's schedule .* export the base with --no-refiner"):
            export_bundle(*stages, tmp_path / "bundle", Options(precision="fp32"))
    export_bundle(base, None, tmp_path / "bundle", Options(precision="fp32"))
    with pytest.raises(UsageError, match="EDM's schedule, which is not supported in ComfyUI's mode"):
        _ours(tmp_path / "bundle", compat="comfyui")
    for settings in ({"schedule": "karras"}, {"prediction_type": "sample"}):
        with pytest.raises(UsageError, match="EDM's"):
            _ours(tmp_path / "bundle", **settings)


def test_img2img_of_an_edm_model_is_diffusers(pairs: Callable[[str], Any], tmp_path: Path) -> None:
    base = _folder(pairs("outline").base, tmp_path / "base", Case("EDMEulerScheduler"))
    export_bundle(base, None, tmp_path / "bundle", Options(precision="fp32"))
    start = np.random.default_rng(4).standard_normal((1, 4, 16, 16), dtype=np.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(base, requires_aesthetics_score=False)
        pipeline.set_progress_bar_config(disable=True)
        latents = pipeline(
            PROMPT, image=torch.from_numpy(start), strength=0.5, num_inference_steps=STEPS, guidance_scale=5.0,
            generator=torch.Generator().manual_seed(SEED), output_type="latent",
        ).images.numpy()  # fmt: skip
    request = Request(PROMPT, steps=STEPS, seed=SEED, image=start, strength=0.5)
    with open_bundle(tmp_path / "bundle", provider="ort-cpu") as opened:
        list(opened.generate(request))
        assert _distance(opened.run.final, latents) < 1e-3
