"""Base, handoff and refiner against diffusers' own base and refiner pipelines, on the same weights in fp32."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sdxl_trt.runtime import Request, open_bundle

# diffusers' own warning: it passes torch tensors to np.array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPT = "a red fox in the snow"
LATENTS_TOLERANCE = 1e-3
PSNR_FLOOR = 50.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One run: picture size, count, steps, handoff, negative prompt, and injected noise or only the seed."""

    pair: str
    width: int
    height: int
    count: int
    steps: int
    fraction: float
    negative: str | None
    injected: bool = False
    sampler: str = "euler"

    def __str__(self) -> str:
        noise = "noise" if self.injected else "seed"
        shape = f"{self.width}x{self.height}x{self.count}"
        return f"{self.pair}-{shape}-{self.steps}@{self.fraction}-{self.negative!r}-{noise}-{self.sampler}"


CASES = [
    Case("outline", 32, 32, 1, 12, 0.8, None),
    Case("outline", 64, 32, 3, 20, 0.7, "", injected=True),
    Case("outline", 32, 32, 1, 30, 0.5, "blurry", injected=True),
    Case("apart", 64, 64, 3, 12, 0.5, None, injected=True),
    Case("apart", 128, 64, 1, 30, 0.8, ""),
    Case("apart", 64, 64, 1, 20, 0.7, "blurry"),
    Case("legacy", 32, 48, 1, 20, 0.8, None),
    Case("legacy", 32, 32, 3, 12, 0.7, "blurry blue", injected=True),
    Case("legacy", 32, 32, 1, 30, 0.5, ""),
    Case("outline", 32, 32, 2, 12, 0.7, None, sampler="euler_ancestral"),
    Case("outline", 32, 32, 1, 20, 0.8, "blurry", sampler="dpmpp_2m"),
]
LONGER = (pytest.mark.compares, pytest.mark.xdist_group("apart"))
SCHEDULERS = {
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}


@pytest.fixture(scope="module")
def experts(pairs: Callable[[str], Any]) -> Callable[[str], tuple[Any, Any]]:
    """Return diffusers' two pipelines of a pair, loaded once."""
    loaded: dict[str, tuple[Any, Any]] = {}

    def get(name: str) -> tuple[Any, Any]:
        from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

        if name not in loaded:
            pair = pairs(name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                base = StableDiffusionXLPipeline.from_pretrained(pair.base)
                refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(pair.refiner)
            for pipeline in (base, refiner):
                pipeline.set_progress_bar_config(disable=True)
            loaded[name] = base, refiner
        return loaded[name]

    return get


@dataclasses.dataclass(frozen=True)
class Reference:
    handoff: np.ndarray
    final: np.ndarray
    pixels: np.ndarray
    refiner_timesteps: list[float]


def _reference(experts: tuple[Any, Any], case: Case, seed: int, noise: np.ndarray | None) -> Reference:
    import diffusers
    import torch

    base, refiner = experts
    for pipeline in experts:
        pipeline.scheduler = getattr(diffusers, SCHEDULERS[case.sampler]).from_config(pipeline.scheduler.config)

    # One generator per picture for both pipelines: the refiner continues the base's random sequence.
    generators = [torch.Generator().manual_seed(seed + i) for i in range(case.count)]

    def settings() -> dict[str, Any]:
        return {
            "prompt": [PROMPT] * case.count,
            "negative_prompt": None if case.negative is None else [case.negative] * case.count,
            "num_inference_steps": case.steps,
            "guidance_scale": 5.0,
            "generator": generators,
        }

    seen: list[float] = []

    def watch(pipeline: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(float(timestep))
        return kwargs

    latents = None if noise is None else torch.from_numpy(noise)
    size = {"width": case.width, "height": case.height}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handed = base(**settings(), **size, latents=latents, denoising_end=case.fraction, output_type="latent").images
        final = refiner(
            **settings(),
            image=handed,
            denoising_start=case.fraction,
            output_type="latent",
            callback_on_step_end=watch,
        ).images
        refiner.vae.to(torch.float32)
        decoded = refiner.vae.decode(final / refiner.vae.config.scaling_factor, return_dict=False)[0]
        pixels = refiner.image_processor.postprocess(decoded, output_type="np")
    return Reference(handed.numpy(), final.numpy(), np.rint(pixels * 255.0), seen)


def _psnr(left: np.ndarray, right: np.ndarray) -> float:
    error = float(np.mean((left.astype(np.float64) - right.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * np.log10(255.0**2 / error)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=LONGER if case.pair == "apart" else ()) for case in CASES], ids=str
)
def test_the_run_matches_diffusers(
    case: Case, pairs: Callable[[str], Any], experts: Callable[[str], Any], rng: np.random.Generator
) -> None:
    pair, pipelines = pairs(case.pair), experts(case.pair)
    factor = pipelines[0].vae_scale_factor
    shape = (case.count, 4, case.height // factor, case.width // factor)
    noise = rng.standard_normal(shape, dtype=np.float32) if case.injected else None
    expected = _reference(pipelines, case, 2**33 + 11, noise)
    request = Request(
        PROMPT, negative=case.negative, steps=case.steps, handoff=case.fraction, seed=2**33 + 11, latents=noise,
        count=case.count, width=case.width, height=case.height, sampler=case.sampler,
    )  # fmt: skip
    with open_bundle(pair.bundle) as pipeline:
        pictures = list(pipeline.generate(request))
        run = pipeline.run

    # diffusers' DPM-Solver keeps latents at unit variance; ours are scaled as in ComfyUI and k-diffusion.
    scale = np.float32(np.hypot(1, run.handoff.sigma) if case.sampler == "dpmpp_2m" else 1)
    np.testing.assert_allclose(run.handoff_latents / scale, expected.handoff, rtol=0, atol=LATENTS_TOLERANCE)
    np.testing.assert_allclose(run.final, expected.final, rtol=0, atol=LATENTS_TOLERANCE)
    pixels = np.stack([np.asarray(picture.image) for picture in pictures])
    assert _psnr(pixels, expected.pixels) >= PSNR_FLOOR
    assert run.handoff.timestep == expected.refiner_timesteps[0]
    assert len(run.timings["refiner"]) == len(expected.refiner_timesteps)


@pytest.mark.slow
def test_the_tolerance_would_notice_a_missing_refiner(pairs: Callable[[str], Any]) -> None:
    """The tolerance of the comparison above is far smaller than the refiner's effect."""
    with open_bundle(pairs("outline").bundle) as pipeline:
        settings = {"steps": 12, "seed": 1, "width": 32, "height": 32}
        list(pipeline.generate(Request(PROMPT, handoff=0.8, **settings)))
        together = pipeline.run.final
        list(pipeline.generate(Request(PROMPT, handoff=None, **settings)))
        alone = pipeline.run.final
    assert np.abs(together - alone).max() > 30 * LATENTS_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["outline", "apart"])
def test_an_absent_negative_follows_each_config(name: str, pairs: Callable[[str], Any]) -> None:
    """outline zeroes an absent negative in the base and encodes it in the refiner; apart the other way round."""
    pair = pairs(name)
    settings = {"steps": 12, "handoff": 0.5, "seed": 3, "width": 64, "height": 64}
    with open_bundle(pair.bundle) as pipeline:
        runs = []
        for negative in (None, ""):
            list(pipeline.generate(Request(PROMPT, negative=negative, **settings)))
            runs.append(pipeline.run)
    base_zeroes, refiner_zeroes = pair.shape.force_zeros
    moved = np.abs(runs[0].handoff_latents - runs[1].handoff_latents).max()
    assert (moved > 0) == base_zeroes
    if not base_zeroes:  # the refiner received equal latents: any difference is its own
        assert (np.abs(runs[0].final - runs[1].final).max() > 0) == refiner_zeroes
    assert pipeline.manifest.base.force_zeros_for_empty_prompt == base_zeroes
    assert pipeline.manifest.refiner.force_zeros_for_empty_prompt == refiner_zeroes


@pytest.mark.slow
def test_shared_components_are_stored_once(pairs: Callable[[str], Any]) -> None:
    with open_bundle(pairs("outline").bundle) as pipeline:
        assert set(pipeline.manifest.components) == {
            "text_encoder", "text_encoder_2", "unet", "unet_shallow", "vae_decoder", "vae_encoder", "refiner_unet",
            "refiner_unet_shallow",
        }  # fmt: skip
        assert set(pipeline.manifest.tokenizers) == {"tokenizer", "tokenizer_2"}
    with open_bundle(pairs("apart").bundle) as pipeline:
        own = {"refiner_text_encoder_2", "refiner_vae_decoder", "refiner_vae_encoder"}
        assert own <= set(pipeline.manifest.components)
        assert pipeline.manifest.refiner.vae.decoder == "refiner_vae_decoder"
        assert pipeline.manifest.refiner.vae.scaling_factor == 0.2


@pytest.mark.slow
@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_one_swap_for_any_number_of_pictures(residency: str, pairs: Callable[[str], Any]) -> None:
    with open_bundle(pairs("outline").bundle, residency=residency) as pipeline:
        request = Request(PROMPT, steps=4, handoff=0.5, seed=0, count=9, width=32, height=32)
        assert len(list(pipeline.generate(request))) == 9
        unets = [name for name in pipeline.pool.loads if name.endswith("unet")]
    assert unets == ["unet", "refiner_unet"]


@pytest.mark.slow
def test_a_picture_does_not_depend_on_its_batch(pairs: Callable[[str], Any]) -> None:
    with open_bundle(pairs("outline").bundle) as pipeline:
        settings = {"steps": 4, "handoff": 0.5, "width": 32, "height": 32}
        list(pipeline.generate(Request(PROMPT, seed=5, count=3, **settings)))
        batch = pipeline.run.final
        list(pipeline.generate(Request(PROMPT, seed=7, **settings)))
        np.testing.assert_allclose(batch[2], pipeline.run.final[0], rtol=0, atol=1e-4)
