"""Runs with a mask against diffusers' StableDiffusionXLInpaintPipeline, on the same weights in fp32.

UNets of 4 channels, whose latents are mixed with the picture's, and of 9, which receive the mask. ComfyUI's way is
compared with its formulas, written again in torch.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from independent.comfyui_masks import ComfyUI, unit
from independent.inpainting import PROMPT, SCHEDULERS, SEED, SIDES, Case, Experts, a_mask, a_picture
from small_models.additions import save_nine_channels

from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.comfyui.reader import read_workflow
from sdxl_trt.runtime.comfyui.requests import check_workflow, pair_request
from sdxl_trt.runtime.pipeline.batch import Batch
from sdxl_trt.runtime.pipeline.chain import Chain
from sdxl_trt.runtime.pipeline.pipeline import Pipeline
from sdxl_trt.runtime.pipeline.run import Run

# diffusers' own warnings: it passes torch tensors to np.array, and KDPM2 takes the logarithm of sigma 0.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]

TOLERANCE = 1e-3
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
    from sdxl_trt.export import Options, export_bundle

    pair, root = pairs("outline"), tmp_path_factory.mktemp("nine")
    base = save_nine_channels(pair.base, root / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdxl_trt.export.exporter.convert_component", convert_once)
        export_bundle(base, pair.refiner, root / "bundle", Options(precision="fp32"))
    with open_bundle(root / "bundle", residency="resident") as pipeline:
        yield pipeline, Experts(base, pair.refiner)


def _request(case: Case, **changes: Any) -> Request:
    refine = case.handoff == "refine"
    settings: dict[str, Any] = {
        "negative": "blurry", "steps": case.steps, "handoff": "auto" if refine else case.handoff, "refine": refine,
        "strength": case.strength, "seed": SEED, "count": case.count, "sampler": case.sampler, "image": a_picture(),
        "mask": a_mask(), "aesthetic_score": 5.0, "negative_aesthetic_score": 3.0, "guidance": case.guidance,
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
    outside = a_mask()[::2, ::2] < 128
    np.testing.assert_allclose(opened.run.final[:, :, outside], final[:, :, outside], rtol=0, atol=1e-5)


def test_outside_the_mask_the_latents_are_the_pictures_own(opened: Pipeline) -> None:
    """Bit for bit, with every sampler, also where the last sigma is not 0 or a refiner takes over."""
    outside = a_mask()[::2, ::2] < 128
    for sampler in ("euler", "ddim", "deis", "dpmpp_sde", "dpmpp_2s_ancestral", "dpm_2_ancestral", "dpmpp_3m_sde"):
        for handoff in (None, 0.6):
            job = opened.start(_request(Case(0.6, sampler=sampler, handoff=handoff, steps=6)))
            for _ in opened._work(job):
                pass
            assert job.clean is not None
            np.testing.assert_array_equal(job.run.final[:, :, outside], job.clean[:, :, outside])
            assert (job.run.final[:, :, ~outside] != job.clean[:, :, ~outside]).any(axis=(0, 1)).all()


def test_a_sweep_over_handoffs_with_a_mask_is_its_single_runs(opened: Pipeline) -> None:
    image, mask = a_picture(), a_mask()
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


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_a_refiner_after_nine_channels_keeps_the_picture(sampler: str, nine: tuple[Pipeline, Experts]) -> None:
    """diffusers' recipe gives it the base's noisy latents to keep; here it keeps the picture."""
    import torch

    pipeline, experts = nine
    case = Case(1.0, handoff=0.5, count=2, sampler=sampler)

    def kept(generators: list[Any]) -> Any:
        vae = experts.pipelines["base"].vae
        pixels = torch.from_numpy(a_picture().transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1)
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
    for changes in ({}, {"seed": SEED + 5}, {"strength": 0.67}, {"mask": a_mask()[::-1]}, {"mask": None}):
        _drawn(opened, _request(case, **changes))
        assert opened.run is not None
        finals.append(opened.run.final)
    for final in finals[1:]:
        assert np.abs(final - finals[0]).max() > 30 * TOLERANCE


def test_comfyuis_way_is_a_transcription_of_its_formulas(opened: Pipeline, experts: Experts) -> None:
    import torch

    for strength, count in ((1.0, 1), (0.6, 2)):
        request = _request(
            Case(strength, count=count), compat="comfyui", strength=None if strength == 1.0 else strength
        )
        _drawn(opened, request)
        assert opened.run is not None
        comfyui = ComfyUI(experts)
        expected = comfyui.sample(
            opened.run, comfyui.encode(unit(a_picture())), torch.from_numpy(a_mask() / np.float32(255))
        )
        np.testing.assert_allclose(opened.run.final, expected, rtol=0, atol=TOLERANCE)


SAMPLER = {
    "steps": 6, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 0.8, "seed": 3,
    "model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["latent", 0],
}  # fmt: skip
NODES = {
    "1": ("CheckpointLoaderSimple", {"ckpt_name": "base.safetensors"}),
    "2": ("CLIPTextEncode", {"clip": ["1", 1], "text": PROMPT}),
    "3": ("CLIPTextEncode", {"clip": ["1", 1], "text": "blurry"}),
    "picture": ("LoadImage", {"image": "picture.png"}),
    "decoded": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["1", 2]}),
    "saved": ("SaveImage", {"images": ["decoded", 0], "filename_prefix": "x"}),
}


@pytest.fixture
def chained(tmp_path: Path) -> Callable[..., Run]:
    """Return a function that runs nodes beside NODES on a pipeline, and gives the run of the sampler."""
    from PIL import Image

    colours = Image.fromarray(a_picture())
    colours.putalpha(Image.fromarray(255 - a_mask()))
    colours.save(tmp_path / "picture.png")
    Image.fromarray(np.stack([a_mask(), a_mask() // 2, 255 - a_mask()], axis=-1)).save(tmp_path / "mask.png")

    def run(pipeline: Pipeline, sampler: dict[str, Any], **nodes: tuple[str, dict[str, Any]]) -> Run:
        every = NODES | nodes | {"sampler": ("KSampler", SAMPLER | sampler)}
        graph = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in every.items()}
        (tmp_path / "graph.json").write_text(json.dumps(graph))
        workflow = read_workflow(tmp_path / "graph.json")
        found = check_workflow(workflow, pipeline.manifest)
        assert pair_request(workflow, pipeline.manifest, found, tmp_path) is None
        chain = Chain(pipeline, workflow, found, tmp_path, lambda request: request)
        pictures = [step.picture for _, step in chain.steps() if step.picture is not None]
        assert len(pictures) == 1
        return chain.runs[0]

    return run


def _loaded() -> tuple[Any, Any]:
    """Return the pixels and the mask of picture.png, as LoadImage returns them."""
    import torch

    alpha = torch.from_numpy((255 - a_mask()).astype(np.float32) / 255.0)
    return unit(a_picture()), 1.0 - alpha


@pytest.mark.parametrize("grow", [0, 3, 6])
def test_vae_encode_for_inpaint(grow: int, opened: Pipeline, experts: Experts, chained: Callable[..., Run]) -> None:
    inputs = {"pixels": ["picture", 0], "vae": ["1", 2], "mask": ["picture", 1], "grow_mask_by": grow}
    run = chained(opened, {}, latent=("VAEEncodeForInpaint", inputs))
    comfyui = ComfyUI(experts)
    latent, mask = comfyui.for_inpaint(*_loaded(), grow)
    np.testing.assert_allclose(run.final, comfyui.sample(run, latent, mask), rtol=0, atol=TOLERANCE)


def test_a_mask_through_many_nodes(opened: Pipeline, experts: Experts, chained: Callable[..., Run]) -> None:
    import scipy.ndimage
    import torch

    run = chained(
        opened, {}, coded=("VAEEncode", {"pixels": ["picture", 0], "vae": ["1", 2]}),
        loaded=("LoadImageMask", {"image": "mask.png", "channel": "blue"}),
        inverted=("InvertMask", {"mask": ["loaded", 0]}),
        grown=("GrowMask", {"mask": ["inverted", 0], "expand": 3, "tapered_corners": True}),
        shrunk=("GrowMask", {"mask": ["grown", 0], "expand": -1, "tapered_corners": False}),
        soft=("FeatherMask", {"mask": ["shrunk", 0], "left": 40, "top": 10, "right": 3, "bottom": 0}),
        latent=("SetLatentNoiseMask", {"samples": ["coded", 0], "mask": ["soft", 0]}),
    )  # fmt: skip
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]])
    mask = 1.0 - (255 - a_mask()).astype(np.float32) / 255.0
    for _ in range(3):
        mask = scipy.ndimage.grey_dilation(mask, footprint=cross)
    soft = torch.from_numpy(scipy.ndimage.grey_erosion(mask, footprint=np.ones((3, 3))))
    for x in range(40):
        soft[:, x] *= (x + 1.0) / 40
    for x in range(3):
        soft[:, -(x + 1)] *= (x + 1) / 3
    for y in range(10):
        soft[y] *= (y + 1) / 10
    comfyui = ComfyUI(experts)
    expected = comfyui.sample(run, comfyui.encode(unit(a_picture())), soft)
    np.testing.assert_allclose(run.final, expected, rtol=0, atol=TOLERANCE)


def test_a_canvas_is_padded(opened: Pipeline, experts: Experts, chained: Callable[..., Run]) -> None:
    import torch

    margins = {"left": 16, "top": 0, "right": 0, "bottom": 16}
    run = chained(
        opened, {}, canvas=("ImagePadForOutpaint", {"image": ["picture", 0], **margins, "feathering": 10}),
        latent=("VAEEncodeForInpaint", {"pixels": ["canvas", 0], "vae": ["1", 2], "mask": ["canvas", 1]}),
    )  # fmt: skip
    width, height = SIDES
    pixels, mask = torch.full((1, 3, height + 16, width + 16), 0.5), torch.ones(height + 16, width + 16)
    pixels[:, :, :height, 16:] = unit(a_picture())
    inner = torch.zeros(height, width)
    for i in range(height):
        for j in range(width):
            distance = min(height, height - i, j, width)
            if distance < 10:
                inner[i, j] = ((10 - distance) / 10) ** 2
    mask[:height, 16:] = inner
    comfyui = ComfyUI(experts)
    latent, noise_mask = comfyui.for_inpaint(pixels, mask, 6)
    np.testing.assert_allclose(run.final, comfyui.sample(run, latent, noise_mask), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("noise_mask", [True, False])
def test_inpaint_model_conditioning(
    noise_mask: bool, opened: Pipeline, experts: Experts, nine: tuple[Pipeline, Experts], chained: Callable[..., Run]
) -> None:
    """With an inpainting model, and with another one, which ignores what it is shown."""
    import torch

    inputs = {"positive": ["2", 0], "negative": ["3", 0], "vae": ["1", 2], "pixels": ["picture", 0],
              "mask": ["picture", 1], "noise_mask": noise_mask}  # fmt: skip
    sampler = {"positive": ["shown", 0], "negative": ["shown", 1], "latent_image": ["shown", 2]}
    pixels, mask = _loaded()
    for pipeline, models in ((opened, experts), nine):
        run = chained(pipeline, sampler, shown=("InpaintModelConditioning", inputs))
        comfyui, concat = ComfyUI(models), None
        if run.request.takes_mask:
            small = torch.nn.functional.interpolate(mask[None, None], size=run.final.shape[2:], mode="bilinear")
            concat = torch.cat([small.round(), comfyui.encode(comfyui.greyed(pixels, mask))], dim=1)
        expected = comfyui.sample(run, comfyui.encode(pixels), mask if noise_mask else None, concat)
        np.testing.assert_allclose(run.final, expected, rtol=0, atol=TOLERANCE)


def test_an_inpainting_model_in_comfyuis_way(nine: tuple[Pipeline, Experts]) -> None:
    """As its InpaintModelConditioning with a noise mask."""
    import torch

    pipeline, experts = nine
    _drawn(pipeline, _request(Case(0.7), compat="comfyui"))
    assert pipeline.run is not None
    comfyui, pixels, mask = ComfyUI(experts), unit(a_picture()), torch.from_numpy(a_mask() / np.float32(255))
    small = torch.nn.functional.interpolate(mask[None, None], size=pipeline.run.final.shape[2:], mode="bilinear")
    concat = torch.cat([small.round(), comfyui.encode(comfyui.greyed(pixels, mask))], dim=1)
    expected = comfyui.sample(pipeline.run, comfyui.encode(pixels), mask, concat)
    np.testing.assert_allclose(pipeline.run.final, expected, rtol=0, atol=TOLERANCE)
