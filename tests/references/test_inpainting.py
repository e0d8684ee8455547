"""Runs with a mask against diffusers' StableDiffusionXLInpaintPipeline, on the same weights in fp32.

UNets of 4 channels, whose latents are mixed with the picture's, and of 9, which receive the mask. ComfyUI's way is
compared with a transcription of its formulas in torch.
"""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.pipeline.batch import Batch
from sdxl_trt.runtime.pipeline.pipeline import Pipeline

# diffusers' own warnings: it passes torch tensors to np.array, and KDPM2 takes the logarithm of sigma 0.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]

PROMPT, SEED, TOLERANCE = "a red fox in the snow", 2**33 + 11, 1e-3
SIDES = 64, 32
"""Width and height of the picture."""
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "uni_pc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    # DDIM for SDXL: no clipping, which is for pixel models, and an end above sigma 0.
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "lcm": ("LCMScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One run: strength, handoff (None for the base alone, "refine" for the refiner alone), steps, and so on."""

    strength: float
    handoff: float | str | None = None
    steps: int = 8
    count: int = 1
    sampler: str = "euler"
    guidance: float = 5.0
    prediction: str = "epsilon"

    def __str__(self) -> str:
        return (
            f"{self.strength}-{self.handoff}-{self.steps}x{self.count}-{self.sampler}-{self.guidance}-{self.prediction}"
        )


CASES = [
    Case(0.6, count=2),
    Case(1.0),
    Case(0.9999, steps=10, guidance=1.0),
    Case(0.6, prediction="v_prediction", count=2),
    Case(1.0, prediction="v_prediction"),
    # diffusers' LMS looks for slopes of steps that a start within the schedule leaves out.
    *(Case(1.0 if name == "lms" else 0.75, sampler=name) for name in SCHEDULERS if name != "euler"),
    Case(1.0, sampler="dpmpp_2m"),
    Case(0.6, handoff="refine", count=2),
    Case(1.0, handoff="refine", steps=5),
    Case(0.8, handoff=0.6, steps=10, count=2),
    Case(1.0, handoff=0.5, steps=8),
    Case(0.8, handoff=0.5, steps=10, sampler="euler_ancestral"),
    Case(0.8, handoff=0.5, steps=10, sampler="dpmpp_2m"),
]
NINE = [
    Case(0.6, count=2),
    Case(1.0, count=2),
    Case(1.0, sampler="euler_ancestral", prediction="v_prediction"),
    Case(0.75, sampler="dpmpp_2m", guidance=1.0),
]


def _picture() -> np.ndarray:
    """Return a picture with edges and colours, like real ones."""
    width, height = SIDES
    y, x = np.mgrid[:height, :width]
    disc = np.hypot(y - height / 2, x - width / 3) < height / 3
    channels = [np.where(disc, 220, x * 3), np.where(disc, 60, y * 5), np.where((x // 8 + y // 8) % 2, 200, 30)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def _mask() -> np.ndarray:
    """Return a mask with a soft edge, whose border follows no grid of latents."""
    width, height = SIDES
    y, x = np.mgrid[:height, :width]
    return np.clip(300 - 18 * np.hypot(y - 13, x - 35), 0, 255).astype(np.uint8)


class Experts:
    """diffusers' inpainting pipelines of base and refiner."""

    def __init__(self, base: Path, refiner: Path) -> None:
        from diffusers import StableDiffusionXLInpaintPipeline

        class Clean(StableDiffusionXLInpaintPipeline):  # type: ignore[misc]
            """Keeps `kept` outside the mask, if it is set, instead of the latents that it starts from."""

            kept: Any = None

            def prepare_latents(self, *arguments: Any, **settings: Any) -> Any:
                latents, noise, start = super().prepare_latents(*arguments, **settings)
                return latents, noise, start if self.kept is None else self.kept

        self.pipelines: dict[str, Any] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, folder in (("base", base), ("refiner", refiner)):
                extra = {"requires_aesthetics_score": name == "refiner"}
                kind = StableDiffusionXLInpaintPipeline if name == "base" else Clean
                self.pipelines[name] = kind.from_pretrained(folder, **extra)
                self.pipelines[name].set_progress_bar_config(disable=True)

    def run(self, case: Case, kept: Callable[[list[Any]], Any] | None = None) -> list[np.ndarray]:
        """Return the latents after each stage; `kept` makes what the refiner keeps, from the generators."""
        import diffusers
        import torch
        from PIL import Image

        generators = [torch.Generator().manual_seed(SEED + i) for i in range(case.count)]
        image: Any = [Image.fromarray(_picture())] * case.count
        mask = [Image.fromarray(_mask())] * case.count
        chain = {"refine": ["refiner"], None: ["base"]}.get(case.handoff, ["base", "refiner"])
        results: list[np.ndarray] = []
        for name in chain:
            pipeline = self.pipelines[name]
            kind, settings = SCHEDULERS[case.sampler]
            config = dict(pipeline.scheduler.config) | {"prediction_type": case.prediction}
            config = {key: value for key, value in config.items() if key not in ("algorithm_type", "clip_sample")}
            pipeline.scheduler = getattr(diffusers, kind).from_config(config, **settings)
            end = {"denoising_end": case.handoff} if name == "base" and case.handoff is not None else {}
            begin = {"denoising_start": case.handoff} if results else {"strength": case.strength}
            scores = {"aesthetic_score": 5.0, "negative_aesthetic_score": 3.0} if name == "refiner" else {}
            if results and kept is not None:
                pipeline.kept = kept(generators)
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = pipeline(
                    [PROMPT] * case.count, image=image, mask_image=mask, negative_prompt=["blurry"] * case.count,
                    num_inference_steps=case.steps, guidance_scale=case.guidance, generator=generators,
                    height=SIDES[1], width=SIDES[0], output_type="latent", **begin, **end, **scores,
                ).images  # fmt: skip
            if name == "refiner":
                pipeline.kept = None
            results.append(image.numpy())
        return results


@pytest.fixture(scope="module")
def experts(pairs: Callable[[str], Any]) -> Experts:
    return Experts(pairs("outline").base, pairs("outline").refiner)


@pytest.fixture(scope="module")
def opened(pairs: Callable[[str], Any]) -> Iterator[Pipeline]:
    with open_bundle(pairs("outline").bundle, residency="resident") as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def nine(
    pairs: Callable[[str], Any], convert_once: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Pipeline, Experts]]:
    """The pair with a base UNet of 9 channels: its bundle, opened, and diffusers' pipelines."""
    import torch
    from diffusers import UNet2DConditionModel

    from sdxl_trt.export import Options, export_bundle

    pair, root = pairs("outline"), tmp_path_factory.mktemp("nine")
    base = Path(shutil.copytree(pair.base, root / "base"))
    config = json.loads((base / "unet" / "config.json").read_text()) | {"in_channels": 9}
    torch.manual_seed(9)
    UNet2DConditionModel.from_config(config).save_pretrained(base / "unet")
    index = json.loads((base / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionXLInpaintPipeline"}
    (base / "model_index.json").write_text(json.dumps(index))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdxl_trt.export.exporter.convert_component", convert_once)
        export_bundle(base, pair.refiner, root / "bundle", Options(precision="fp32"))
    with open_bundle(root / "bundle", residency="resident") as pipeline:
        yield pipeline, Experts(base, pair.refiner)


def _request(case: Case, **changes: Any) -> Request:
    refine = case.handoff == "refine"
    settings: dict[str, Any] = {
        "negative": "blurry", "steps": case.steps, "handoff": "auto" if refine else case.handoff, "refine": refine,
        "strength": case.strength, "seed": SEED, "count": case.count, "sampler": case.sampler, "image": _picture(),
        "mask": _mask(), "aesthetic_score": 5.0, "negative_aesthetic_score": 3.0, "guidance": case.guidance,
        "prediction_type": case.prediction,
    }  # fmt: skip
    return Request(PROMPT, **settings | changes)


def _drawn(pipeline: Pipeline, request: Request) -> list[np.ndarray]:
    """Return the pixels of the request's pictures."""
    return [np.asarray(picture.image) for picture in pipeline.generate(request)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_run_is_diffusers_run(case: Case, opened: Pipeline, experts: Experts) -> None:
    *handed, final = experts.run(case)
    _drawn(opened, _request(case))
    assert opened.run is not None
    if handed:
        scale = 1.0
        if case.sampler == "dpmpp_2m":  # diffusers keeps its latents in the variance-preserving scale
            assert opened.run.handoff is not None
            scale = np.sqrt(opened.run.handoff.sigma**2 + 1)
        np.testing.assert_allclose(opened.run.handoff_latents / scale, handed[0], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(opened.run.final, final, rtol=0, atol=TOLERANCE)
    outside = _mask()[::2, ::2] < 128
    np.testing.assert_allclose(opened.run.final[:, :, outside], final[:, :, outside], rtol=0, atol=1e-5)


def test_outside_the_mask_the_latents_are_the_pictures_own(opened: Pipeline) -> None:
    """Bit for bit, with every sampler, also where the last sigma is not 0 or a refiner takes over."""
    outside = _mask()[::2, ::2] < 128
    for sampler in ("euler", "ddim", "deis", "dpmpp_sde", "dpmpp_2s_ancestral", "dpm_2_ancestral", "dpmpp_3m_sde"):
        for handoff in (None, 0.6):
            job = opened.start(_request(Case(0.6, sampler=sampler, handoff=handoff, steps=6)))
            for _ in opened._work(job):
                pass
            assert job.clean is not None
            np.testing.assert_array_equal(job.run.final[:, :, outside], job.clean[:, :, outside])
            assert (job.run.final[:, :, ~outside] != job.clean[:, :, ~outside]).any(axis=(0, 1)).all()


def test_a_sweep_over_handoffs_with_a_mask_is_its_single_runs(opened: Pipeline) -> None:
    image, mask = _picture(), _mask()
    handoffs = (0.5, 0.8, None)
    cases = [Case(0.8, handoff=each, steps=10, sampler="euler_ancestral") for each in handoffs]
    requests = [_request(case, image=image, mask=mask) for case in cases]
    batch = Batch(opened, requests)
    stages = [step.stage for _, step in batch.steps()]
    assert stages.count("base") == 8, "one base run of 8 of 10 steps"
    for request, run in zip(requests, batch.runs, strict=True):
        _drawn(opened, request)
        assert opened.run is not None
        np.testing.assert_allclose(run.final, opened.run.final, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", NINE, ids=str)
def test_a_unet_of_nine_channels_runs_as_in_diffusers(case: Case, nine: tuple[Pipeline, Experts]) -> None:
    pipeline, experts = nine
    (final,) = experts.run(case)
    _drawn(pipeline, _request(case))
    assert pipeline.run is not None
    np.testing.assert_allclose(pipeline.run.final, final, rtol=0, atol=TOLERANCE)


def test_a_refiner_after_nine_channels_keeps_the_picture(nine: tuple[Pipeline, Experts]) -> None:
    """diffusers' recipe gives it the base's noisy latents to keep; here it keeps the picture."""
    import torch

    pipeline, experts = nine
    case = Case(1.0, handoff=0.5, count=2)

    def kept(generators: list[Any]) -> Any:
        vae = experts.pipelines["base"].vae
        pixels = torch.from_numpy(_picture().transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1)
        with torch.no_grad():
            drawn = [vae.encode(pixels).latent_dist.sample(generator) for generator in generators]
        return torch.cat(drawn) * vae.config.scaling_factor

    handed, final = experts.run(case, kept)
    _drawn(pipeline, _request(case))
    assert pipeline.run is not None
    np.testing.assert_allclose(pipeline.run.handoff_latents, handed, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(pipeline.run.final, final, rtol=0, atol=TOLERANCE)


def test_the_tolerance_detects_another_mask_strength_or_draw(opened: Pipeline) -> None:
    case, finals = Case(0.6, steps=6), []
    for changes in ({}, {"seed": SEED + 5}, {"strength": 0.67}, {"mask": _mask()[::-1]}, {"mask": None}):
        _drawn(opened, _request(case, **changes))
        assert opened.run is not None
        finals.append(opened.run.final)
    for final in finals[1:]:
        assert np.abs(final - finals[0]).max() > 30 * TOLERANCE
