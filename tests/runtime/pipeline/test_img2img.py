"""Runs that start from a picture against diffusers' StableDiffusionXLImg2ImgPipeline, on the same weights in fp32."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.pipeline.batch import Batch
from sdxl_trt.runtime.pipeline.pipeline import Pipeline
from sdxl_trt.runtime.vae import encode as encode_module

# diffusers' own warning: it passes torch tensors to np.array.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]

PROMPT, SEED = "a red fox in the snow", 2**33 + 11
TOLERANCE = 1e-3
SIDES = 64, 32
"""Width and height of the picture."""
SCHEDULERS = {
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
    "ddim": "DDIMScheduler",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One run: strength, handoff (None for the base alone, "refine" for the refiner alone), steps, and so on."""

    strength: float
    handoff: float | str | None = 0.8
    steps: int = 12
    count: int = 1
    sampler: str = "euler"
    negative: str | None = "blurry"
    start: str = "picture"

    def __str__(self) -> str:
        return f"{self.strength}-{self.handoff}-{self.steps}x{self.count}-{self.sampler}-{self.negative!r}-{self.start}"


CASES = [
    Case(0.5, count=2),
    Case(0.3, steps=20, negative=None),
    Case(1.0, handoff=0.5, steps=6),
    Case(0.6, handoff=None, steps=10, count=2, sampler="euler_ancestral"),
    Case(0.55, handoff=None, sampler="dpmpp_2m"),
    Case(0.5, handoff=None, steps=6, sampler="heun"),
    Case(0.7, handoff=None, steps=10, sampler="ddim"),
    Case(0.3, handoff="refine", steps=20, count=2),
    Case(0.4, handoff="refine", steps=10, start="latents", negative=None),
    Case(0.6, handoff=0.7, steps=10, start="latents", count=2),
]


@pytest.fixture(scope="module")
def experts(pairs: Callable[[str], Any]) -> dict[str, Any]:
    """diffusers' img2img pipelines of base and refiner."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    pair, loaded = pairs("outline"), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, folder in (("base", pair.base), ("refiner", pair.refiner)):
            # The base's config does not mention aesthetic scores, and the img2img class expects them by default.
            extra = {"requires_aesthetics_score": False} if name == "base" else {}
            loaded[name] = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder, **extra)
            loaded[name].set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def opened(pairs: Callable[[str], Any]) -> Iterator[Pipeline]:
    with open_bundle(pairs("outline").bundle, residency="resident") as pipeline:
        yield pipeline


def _picture() -> np.ndarray:
    """Return a picture with edges and colours, like real ones."""
    width, height = SIDES
    y, x = np.mgrid[:height, :width]
    disc = np.hypot(y - height / 2, x - width / 3) < height / 3
    channels = [np.where(disc, 220, x * 3), np.where(disc, 60, y * 5), np.where((x // 8 + y // 8) % 2, 200, 30)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def _start(case: Case) -> np.ndarray:
    if case.start == "picture":
        return _picture()
    return np.random.default_rng(4).standard_normal((case.count, 4, SIDES[1] // 2, SIDES[0] // 2), dtype=np.float32)


def _reference(experts: dict[str, Any], case: Case) -> tuple[np.ndarray | None, np.ndarray]:
    """Return the latents at the handoff, or None without one, and the last latents."""
    import diffusers
    import torch
    from PIL import Image

    generators = [torch.Generator().manual_seed(SEED + i) for i in range(case.count)]
    start = _start(case)
    image = Image.fromarray(start) if case.start == "picture" else torch.from_numpy(start)
    chain = {"refine": ["refiner"], None: ["base"]}.get(case.handoff, ["base", "refiner"])
    results = []
    for name in chain:
        pipeline = experts[name]
        # DDIM for SDXL: no clipping, which is for pixel models, and an end above sigma 0.
        settings = {"clip_sample": False, "set_alpha_to_one": False} if case.sampler == "ddim" else {}
        kind = getattr(diffusers, SCHEDULERS[case.sampler])
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **settings)
        end = {"denoising_end": case.handoff} if name == "base" and case.handoff is not None else {}
        begin = {"denoising_start": case.handoff} if results else {"strength": case.strength}
        negative = None if case.negative is None else [case.negative] * case.count
        scores = {"aesthetic_score": 5.0, "negative_aesthetic_score": 3.0} if name == "refiner" else {}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = pipeline(
                [PROMPT] * case.count, image=image, negative_prompt=negative, num_inference_steps=case.steps,
                guidance_scale=5.0, generator=generators, output_type="latent", **begin, **end, **scores,
            ).images  # fmt: skip
        results.append(image.numpy())
    return (results[0] if len(results) == 2 else None), results[-1]


def _request(case: Case, **changes: Any) -> Request:
    refine = case.handoff == "refine"
    settings: dict[str, Any] = {
        "negative": case.negative, "steps": case.steps, "handoff": "auto" if refine else case.handoff, "refine": refine,
        "strength": case.strength, "seed": SEED, "count": case.count, "sampler": case.sampler, "image": _start(case),
        "aesthetic_score": 5.0, "negative_aesthetic_score": 3.0,
    }  # fmt: skip
    return Request(PROMPT, **settings | changes)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_run_is_diffusers_run(case: Case, opened: Pipeline, experts: dict[str, Any]) -> None:
    handed, final = _reference(experts, case)
    pictures = list(opened.generate(_request(case)))
    assert [picture.image.size for picture in pictures] == [SIDES] * case.count
    if handed is not None:
        np.testing.assert_allclose(opened.run.handoff_latents, handed, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(opened.run.final, final, rtol=0, atol=TOLERANCE)


def test_the_tolerance_detects_another_draw_strength_or_noise(opened: Pipeline) -> None:
    """The tolerance is far smaller than the effect of each."""
    case, finals = dataclasses.replace(CASES[0], steps=6, count=1), []
    for changes in ({}, {"seed": SEED + 5}, {"strength": 0.67}, {"image": _picture()[::-1]}, {"refine": True,
                    "handoff": "auto"}):  # fmt: skip
        list(opened.generate(_request(case, **changes)))
        finals.append(opened.run.final)
    for final in finals[1:]:
        assert np.abs(final - finals[0]).max() > 30 * TOLERANCE


def test_the_image_is_encoded_first_and_only_once(opened: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    phase = opened.pool.phase
    monkeypatch.setattr(
        opened.pool, "phase", lambda *names, next_engines=(): phases.append((names, next_engines)) or phase(*names)
    )
    stages = [step.stage for step in opened.steps(_request(CASES[0]))]
    assert stages[:3] == ["picture", "encode", "load"]
    assert stages.count("picture") == 1
    assert phases[:2] == [(("vae_encoder",), ("text_encoder",)), (("text_encoder",), ("text_encoder_2",))]
    assert opened.run.timings["picture"]
    assert next(opened.steps(_request(CASES[8]))).stage == "encode", "latents need no encoding"


def test_the_refiner_alone_does_not_load_the_bases_engines(opened: Pipeline, monkeypatch: Any) -> None:
    names: list[str] = []
    phase = opened.pool.phase
    monkeypatch.setattr(
        opened.pool, "phase", lambda *wanted, next_engines=(): names.extend((*wanted, *next_engines)) or phase(*wanted)
    )
    list(opened.generate(_request(CASES[7], count=1, steps=4)))
    assert set(names) == {"vae_encoder", "text_encoder_2", "refiner_unet", "vae_decoder"}
    assert (opened.run.handoff_latents, opened.run.handoff) == (None, None), "there is no handoff"


def test_an_encoder_with_small_profiles_gets_tiles(opened: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    (encoder,) = opened.pool.phase("vae_encoder")
    shapes, infer, finals = [], encoder.infer, []
    monkeypatch.setattr(encoder, "infer", lambda inputs: shapes.append(inputs["sample"].shape) or infer(inputs))
    for takes in (None, [((8, 8), (16, 16))]):
        monkeypatch.setattr(encode_module, "encoder_sizes", lambda *_, takes=takes: takes)
        job = opened.start(_request(CASES[0], compat="comfyui", base_add_noise=False, strength=1.0))
        list(opened.pictures([job]))
        finals.append(job.latents)
    width, height = SIDES
    assert shapes == [(1, 3, height, width)] + [(1, 3, 32, 32)] * 3
    # Its weights are random, and its group norms see one tile each.
    assert 0.9 < np.corrcoef(finals[0].ravel(), finals[1].ravel())[0, 1] < 1


def test_a_sweep_shares_the_encoding_and_the_base(opened: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    image = _picture()
    cuts = [dataclasses.replace(CASES[0], handoff=handoff, count=1) for handoff in (0.6, 0.8, None, 0.4)]
    requests = [_request(case, image=image, guidance=1.0) for case in cuts]
    requests.append(_request(cuts[0], image=image, guidance=1.0, strength=0.25))
    (encoder,) = opened.pool.phase("vae_encoder")
    calls: list[str] = []
    infer = encoder.infer
    monkeypatch.setattr(encoder, "infer", lambda *rest: calls.append("encoder") or infer(*rest))
    batch = Batch(opened, requests)
    stages = [step.stage for _, step in batch.steps()]
    assert len(calls) == 1
    # 12 steps at strength 0.5 start at step 6, and the base alone runs to the end; handoff 0.4 is before the start.
    assert stages.count("base") == 6
    for request, run in zip(requests, batch.runs, strict=True):
        list(opened.generate(request))
        np.testing.assert_allclose(run.final, opened.run.final, rtol=0, atol=1e-5)
    assert batch.runs[3].request.refiner_only
    assert not batch.runs[0].request.refiner_only


def test_sizes_come_from_the_picture_or_from_the_request(opened: Pipeline) -> None:
    image = np.zeros((70, 100, 3), np.uint8)

    def size(**settings: Any) -> tuple[int, int, str]:
        request = opened.start(_request(CASES[0], image=image, **settings)).run.request
        return request.width, request.height, request.fit

    multiple = 16
    assert size() == (96, 64, "scale")
    assert size(compat="comfyui") == (96, 64, "crop")
    assert size(width=64, height=64) == (64, 64, "cover")
    assert size(width=200 // multiple * multiple) == (192, 128, "cover")
    with pytest.raises(UsageError, match="a picture of 100x5 pixels is smaller"):
        opened.start(_request(CASES[0], image=image[:5]))


def test_unsuitable_images_are_refused_before_anything_is_loaded(opened: Pipeline) -> None:
    latents = _start(CASES[9])
    for changes, words in (
        ({"image": None}, "give it with --image or --refine"),
        ({"image": latents[:, :3]}, r"to start from have shape \[2, 3"),
        ({"image": latents, "count": 3}, r"for 3 picture\(s\) of 64x32 give \[3, 4, 16, 32\]"),
        ({"image": latents, "width": 32}, "to start from have shape"),
        ({"image": latents, "strength": 0.01}, "less than one of them"),
        ({"image": latents.astype(float)}, "give uint8"),
    ):
        with pytest.raises(UsageError, match=words):
            opened.steps(_request(CASES[9], **changes))
