"""ComfyUI mode against a reference KSamplerAdvanced in torch, on the same weights: independent/ksampler.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from independent.ksampler import Cond, Grid, Reference, Segments, chunks, denoised, encoded, ksampler, normal

from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.cli.generate import main as trt_generate
from sdxl_trt.runtime.comfyui.reader import read_workflow
from sdxl_trt.runtime.comfyui.requests import check_workflow
from sdxl_trt.runtime.pipeline.chain import Chain
from sdxl_trt.runtime.pipeline.pipeline import Pipeline
from sdxl_trt.runtime.request.resolve import resolve_request
from sdxl_trt.runtime.text.encoder import Prompt, PromptEncoder

# diffusers' own warning: it passes torch tensors to np.array.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]

TOLERANCE = 1e-3
SIDE = 32
PROMPT = (
    "Amazing detailed photography of a cute beautiful girl, pink hair, high resolution, piercing eyes, Anti-Aliasing,"
    " FXAA, De-Noise, Post-roduction, SFX, insanely detailed & intricate, elegant, ornate, hyper realistic, super"
    " detailed, noir coloration, serene, 16k resolution"
)
BAD = "worst quality, low quality, illustration, 3d, 2d, painting, cartoons, sketch"
REST = ", tooth, open mouth, dull, blurry, watermark, low quality, black and white, city"


@pytest.fixture(scope="module")
def reference(pairs: Callable[[str], Any]) -> Any:
    import torch

    with torch.no_grad():
        yield Reference(pairs("outline"))


@pytest.fixture(scope="module")
def opened(pairs: Callable[[str], Any]) -> Any:
    with open_bundle(pairs("outline").bundle, residency="resident") as pipeline:
        yield pipeline


def _randn(seed: int, count: int = 1) -> Any:
    import torch

    return torch.randn((count, 4, SIDE // 2, SIDE // 2), generator=torch.Generator().manual_seed(seed))


# start, end, add_noise and leftover of base and refiner, in 6 steps.
FIELDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "an ordinary handoff": ({"end": 4, "leftover": True}, {"start": 4, "add_noise": False}),
    "a step left out": ({"end": 3, "leftover": True}, {"start": 4, "add_noise": False}),
    "a step taken twice": ({"end": 4, "leftover": True}, {"start": 3, "add_noise": False}),
    "no leftover noise": ({"end": 4}, {"start": 4, "add_noise": False}),
    "no leftover noise, and added": ({"end": 4}, {"start": 4}),
    "both noises": ({"end": 4, "leftover": True}, {"start": 4}),
    "refined after": ({}, {"start": 3}),
    "an idle refiner": ({"end": 10_000}, {"start": 32, "add_noise": False}),
    "a refiner from the first step": ({"end": 4}, {"start": 0}),
    "the refiner stops early": ({"end": 3, "leftover": True}, {"start": 3, "end": 5, "add_noise": False}),
    "and leaves noise": ({"end": 3, "leftover": True}, {"start": 3, "end": 5, "add_noise": False, "leftover": True}),
    "the refiner's end before its start": ({"end": 4}, {"start": 4, "end": 3, "add_noise": False}),
    "the base starts late": ({"start": 1, "end": 4, "leftover": True}, {"start": 4, "add_noise": False}),
    "the base adds no noise": ({"end": 4, "add_noise": False, "leftover": True}, {"start": 4, "add_noise": False}),
    "the base does nothing": ({"start": 5, "end": 2, "leftover": True}, {"start": 2}),
}


def _settings(base: dict[str, Any], refiner: dict[str, Any]) -> dict[str, Any]:
    """Return the request's settings for the fields of both samplers."""
    whole = {"start": 0, "end": 10_000, "add_noise": True, "leftover": False}
    base, refiner = whole | base, whole | refiner
    return {
        "base_start_step": base["start"], "base_end_step": base["end"], "base_add_noise": base["add_noise"],
        "leftover_noise": base["leftover"], "refiner_start_step": refiner["start"], "refiner_end_step": refiner["end"],
        "refiner_add_noise": refiner["add_noise"], "refiner_leftover_noise": refiner["leftover"],
    }  # fmt: skip


# In diffusers mode only the grid and the source of the refiner's noise differ.
IN_DIFFUSERS = ("no leftover noise, and added", "a refiner from the first step", "the refiner stops early")
CASES = [("comfyui", name) for name in FIELDS] + [("diffusers", name) for name in IN_DIFFUSERS]


@pytest.mark.parametrize(("compat", "name"), CASES)
def test_every_field_is_ksampler_advanceds(compat: str, name: str, opened: Pipeline, reference: Any) -> None:
    import torch

    comfyui, fields = compat == "comfyui", FIELDS[name]
    request = Request("a red fox", compat=compat, negative="blurry", steps=6, guidance=4.0, seed=3, count=2,
                      width=SIDE, height=SIDE, **_settings(*fields))  # fmt: skip
    list(opened.generate(request))
    conds = [
        (reference.base_cond([(text, 1.0)], [(text, 1.0)], [SIDE, SIDE, 0, 0, SIDE, SIDE]),
         reference.refiner_cond([(text, 1.0)], [SIDE, SIDE, 0, 0, score]))
        for text, score in (("a red fox", 6.0), ("blurry", 2.5))
    ]  # fmt: skip
    if comfyui:
        grid, noises = normal(6), [_randn(3, 2)] * 2
    else:
        scheduler = reference.base.scheduler
        scheduler.set_timesteps(6)
        grid = Grid(scheduler.sigmas, scheduler.timesteps, float(scheduler.init_noise_sigma))
        streams = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        shape = (1, 4, SIDE // 2, SIDE // 2)
        noises = [torch.cat([torch.randn(shape, generator=stream) for stream in streams]) for _ in range(2)]
    (base, refiner), latent = fields, torch.zeros((2, 4, SIDE // 2, SIDE // 2))
    handed = ksampler(reference.base.unet, grid, conds[0][0], conds[1][0], 4.0, latent, noises[0], **base)
    final = ksampler(reference.refiner.unet, grid, conds[0][1], conds[1][1], 4.0, handed, noises[1], **refiner)
    np.testing.assert_allclose(opened.run.final, final.numpy(), rtol=0, atol=TOLERANCE)
    if opened.run.handoff_latents is not None:
        np.testing.assert_allclose(opened.run.handoff_latents, handed.numpy(), rtol=0, atol=TOLERANCE)


def _workflow(prompt: str, negative: str) -> dict[str, Any]:
    """Return the tutorial's graph in ComfyUI's API format."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    sizes = {"width": 4096, "height": 2048, "crop_w": 8, "crop_h": 16, "target_width": 1024, "target_height": 512}

    def base(text: str) -> dict[str, Any]:
        return node("CLIPTextEncodeSDXL", **sizes, text_g=text, text_l=text, clip=["4", 1])

    def refiner(text: str) -> dict[str, Any]:
        return node("CLIPTextEncodeSDXLRefiner", ascore=6.0, width=SIDE, height=SIDE, text=text, clip=["12", 1])

    common = {"noise_seed": 0, "steps": 50, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal"}
    return {
        "4": node("CheckpointLoaderSimple", ckpt_name="base.safetensors"),
        "12": node("CheckpointLoaderSimple", ckpt_name="refiner.safetensors"),
        "5": node("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1),
        "6": base(prompt), "7": base(negative), "15": refiner(prompt), "16": refiner(negative),
        "10": node("KSamplerAdvanced", **common, add_noise="enable", start_at_step=0, end_at_step=40,
                   return_with_leftover_noise="enable", model=["4", 0], positive=["6", 0], negative=["7", 0],
                   latent_image=["5", 0]),
        "11": node("KSamplerAdvanced", **common, add_noise="disable", start_at_step=40, end_at_step=10000,
                   return_with_leftover_noise="disable", model=["12", 0], positive=["15", 0], negative=["16", 0],
                   latent_image=["10", 0]),
        "17": node("VAEDecode", samples=["11", 0], vae=["12", 2]),
        "19": node("SaveImage", filename_prefix="x", images=["17", 0]),
    }  # fmt: skip


def test_the_tutorials_workflow_gives_the_references_latents(
    pairs: Callable[[str], Any], reference: Any, tmp_path: Path, capsys: Any
) -> None:
    """50 steps, 40 of them the base's; weights, different numbers of chunks, one score for both sides."""
    import torch

    workflow, latents = tmp_path / "workflow.json", tmp_path / "latents.npz"
    workflow.write_text(json.dumps(_workflow(PROMPT, f"({BAD}){REST}")))
    arguments = ["--workflow", str(workflow), "--engines", str(pairs("outline").bundle), "-o", str(tmp_path / "x.png")]
    assert trt_generate([*arguments, "--save-latents", str(latents)]) == 0
    assert "warning" not in capsys.readouterr().err
    texts: list[Segments] = [[(PROMPT, 1.0)], [(BAD, 1.1), (REST, 1.0)]]
    assert len({len(chunks(reference.base.tokenizer, text)[0]) for text in texts}) == 2, "different lengths"
    base = [reference.base_cond(text, text, [2048, 4096, 16, 8, 512, 1024]) for text in texts]
    refiner = [reference.refiner_cond(text, [SIDE, SIDE, 0, 0, 6.0]) for text in texts]
    grid, noise = normal(50), _randn(0)
    handed = ksampler(reference.base.unet, grid, *base, 8.0, torch.zeros_like(noise), noise, end=40, leftover=True)
    final = ksampler(reference.refiner.unet, grid, *refiner, 8.0, handed, noise, start=40, add_noise=False)
    with np.load(latents) as found:
        np.testing.assert_allclose(found["handoff"], handed.numpy(), rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(found["final"], final.numpy(), rtol=0, atol=TOLERANCE)


def test_a_shorter_text_is_padded_with_empty_chunks(opened: Pipeline, reference: Any) -> None:
    encoder, stage = PromptEncoder(opened.pool), opened.manifest.base
    for prompt_l, prompt_g in (("a red fox", PROMPT), (PROMPT, "a red fox"), ("", "")):
        (ours,) = encoder.encode([(stage, Prompt(prompt_l, prompt_g))], stage.unet, weighted=True)
        expected = reference.base_cond([(prompt_g, 1.0)], [(prompt_l, 1.0)], [0.0] * 6)
        np.testing.assert_allclose(ours.hidden, expected.hidden[0].numpy(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(ours.pooled, expected.pooled[0].numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_clip_skip_skips_layers(clip_skip: int, opened: Pipeline, reference: Any) -> None:
    """As in diffusers' encode_prompt, which skips none for the negative prompt."""
    expected = reference.base.encode_prompt("a red fox", clip_skip=clip_skip, negative_prompt="blurry")
    ours = []
    for compat in ("diffusers", "comfyui"):
        request = Request("a red fox", compat=compat, negative="blurry", clip_skip=clip_skip, width=SIDE, height=SIDE)
        sides = resolve_request(request, opened.manifest).sides["base"]
        stage = opened.manifest.base
        ours.append(PromptEncoder(opened.pool).encode([(stage, side.prompt) for side in sides], stage.unet))
    for found, tensor in zip(ours[0], expected[:2], strict=True):
        np.testing.assert_allclose(found.hidden, tensor[0].numpy(), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(ours[0][0].hidden, ours[1][0].hidden)
    assert (np.abs(ours[0][1].hidden - ours[1][1].hidden).max() > 0.01) == (clip_skip > 0), "ComfyUI skips both"


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A picture whose size is not a multiple: 3 rows and 5 columns too many."""
    y, x = np.mgrid[: SIDE + 3, : SIDE + 5]
    return np.stack([x * 6, y * 7, np.where((x // 4 + y // 4) % 2, 200, 20)], axis=-1).astype(np.uint8)


# The request's settings, and (stage, grid, fields) of each sampler.
FROM_A_PICTURE: dict[str, tuple[dict[str, Any], list[tuple[str, Grid, dict[str, Any]]]]] = {
    "a KSampler": ({"strength": 0.5, "handoff": None}, [("base", denoised(4, 0.5), {})]),
    "all of the steps": ({"strength": 1.0, "handoff": None}, [("base", normal(4), {})]),
    "the refiner's": ({"strength": 0.4, "refine": True}, [("refiner", denoised(4, 0.4), {})]),
    "two advanced": (
        {"base_start_step": 1, "base_end_step": 3},
        [("base", normal(4), {"start": 1, "end": 3, "leftover": True}),
         ("refiner", normal(4), {"start": 3, "add_noise": False})],
    ),
    "no noise of its own": (
        {"base_start_step": 2, "base_add_noise": False, "handoff": None},
        [("base", normal(4), {"start": 2, "add_noise": False})],
    ),
    "a grid cut by its sigma": (
        {"strength": 0.6, "handoff_step": 2},
        [("base", denoised(4, 0.6), {"end": 2, "leftover": True}),
         ("refiner", denoised(4, 0.6), {"start": 2, "add_noise": False})],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FROM_A_PICTURE)
def test_a_picture_is_sampled_as_in_comfyui(name: str, opened: Pipeline, reference: Any, photo: np.ndarray) -> None:
    changes, samplers = FROM_A_PICTURE[name]
    settings: dict[str, Any] = {"compat": "comfyui", "steps": 4, "guidance": 4.0, "seed": 3, "count": 2, **changes}
    list(opened.generate(Request("a red fox", negative="blurry", image=photo, **settings)))
    x = encoded(reference, photo[1 : SIDE + 1, 2 : SIDE + 2]).repeat(2, 1, 1, 1)
    for stage, grid, fields in samplers:
        conds = [
            reference.base_cond([(text, 1.0)], [(text, 1.0)], [SIDE, SIDE, 0, 0, SIDE, SIDE]) if stage == "base"
            else reference.refiner_cond([(text, 1.0)], [SIDE, SIDE, 0, 0, score])
            for text, score in (("a red fox", 6.0), ("blurry", 2.5))
        ]  # fmt: skip
        x = ksampler(getattr(reference, stage).unet, grid, *conds, 4.0, x, _randn(3, 2), **fields)
    np.testing.assert_allclose(opened.run.final, x.numpy(), rtol=0, atol=TOLERANCE)


def test_a_workflow_that_loads_a_picture_and_refines_the_result(
    pairs: Callable[[str], Any], reference: Any, photo: np.ndarray, tmp_path: Path
) -> None:
    """LoadImage, VAEEncode, a KSampler for each model: each with its own grid and its own seed."""
    from PIL import Image

    graph = _workflow("a red fox", "blurry")
    (tmp_path / "pictures").mkdir()
    Image.fromarray(photo).save(tmp_path / "pictures" / "in.png")
    graph["5"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["20", 0], "vae": ["4", 2]}}
    graph["20"] = {"class_type": "LoadImage", "inputs": {"image": "pictures\\in.png [input]"}}
    for node, seed, denoise in (("10", 5, 0.5), ("11", 6, 0.25)):
        links = {name: value for name, value in graph[node]["inputs"].items() if isinstance(value, list)}
        graph[node] = {"class_type": "KSampler", "inputs": links | {
            "seed": seed, "steps": 4, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": denoise,
        }}  # fmt: skip
    workflow, latents = tmp_path / "workflow.json", tmp_path / "latents.npz"
    workflow.write_text(json.dumps(graph))
    arguments = ["--workflow", str(workflow), "--engines", str(pairs("outline").bundle), "-o", str(tmp_path / "x.png")]
    assert trt_generate([*arguments, "--save-latents", str(latents)]) == 0
    texts: list[Segments] = [[("a red fox", 1.0)], [("blurry", 1.0)]]
    base = [reference.base_cond(text, text, [2048, 4096, 16, 8, 512, 1024]) for text in texts]
    refiner = [reference.refiner_cond(text, [SIDE, SIDE, 0, 0, 6.0]) for text in texts]
    x = encoded(reference, photo[1 : SIDE + 1, 2 : SIDE + 2])
    x = ksampler(reference.base.unet, denoised(4, 0.5), *base, 4.0, x, _randn(5))
    x = ksampler(reference.refiner.unet, denoised(4, 0.25), *refiner, 4.0, x, _randn(6))
    with np.load(latents) as found:
        np.testing.assert_allclose(found["final"], x.numpy(), rtol=0, atol=TOLERANCE)


def _chain() -> dict[str, Any]:
    """Return a graph of three samplers: latents scaled after the first, pixels after the second, mixed prompts."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    def sampler(
        seed: int, steps: int, denoise: float, model: str, sides: tuple[str, str], latents: str
    ) -> dict[str, Any]:
        return node("KSampler", seed=seed, steps=steps, cfg=4.0, sampler_name="euler", scheduler="normal",
                    denoise=denoise, model=[model, 0], positive=[sides[0], 0], negative=[sides[1], 0],
                    latent_image=[latents, 0])  # fmt: skip

    base = {"clip": ["4", 1]}
    refiner = {"clip": ["12", 1], "ascore": 6.0, "width": SIDE, "height": SIDE}
    return {
        "4": node("CheckpointLoaderSimple", ckpt_name="base.safetensors"),
        "12": node("CheckpointLoaderSimple", ckpt_name="refiner.safetensors"),
        "5": node("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1),
        "1": node("CLIPTextEncode", text="a red fox", **base), "2": node("CLIPTextEncode", text="snow", **base),
        "3": node("CLIPTextEncode", text="blurry", **base),
        "6": node("ConditioningConcat", conditioning_to=["1", 0], conditioning_from=["2", 0]),
        "7": node("ConditioningAverage", conditioning_to=["6", 0], conditioning_from=["2", 0],
                  conditioning_to_strength=0.25),
        "8": node("ConditioningCombine", conditioning_1=["7", 0], conditioning_2=["2", 0]),
        "15": node("CLIPTextEncodeSDXLRefiner", text="a red fox", **refiner),
        "16": node("CLIPTextEncodeSDXLRefiner", text="blurry", **refiner),
        "20": sampler(3, 4, 1.0, "4", ("8", "3"), "5"),
        "21": node("LatentUpscaleBy", samples=["20", 0], upscale_method="bicubic", scale_by=2.0),
        "22": sampler(5, 3, 0.5, "4", ("1", "3"), "21"),
        "23": node("VAEDecode", samples=["22", 0], vae=["4", 2]),
        "24": node("ImageScale", image=["23", 0], upscale_method="area", width=SIDE, height=SIDE, crop="disabled"),
        "25": node("VAEEncode", pixels=["24", 0], vae=["4", 2]),
        "26": sampler(7, 5, 0.4, "12", ("15", "16"), "25"),
        "27": node("VAEDecode", samples=["26", 0], vae=["12", 2]),
        "28": node("SaveImage", filename_prefix="x", images=["27", 0]),
        "29": node("SaveImage", filename_prefix="y", images=["24", 0]),
    }  # fmt: skip


def test_samplers_in_a_row_continue_from_scaled_latents_and_pixels(
    opened: Pipeline, reference: Any, tmp_path: Path
) -> None:
    """Three grids, two experts, latents and pixels scaled, prompts joined, averaged and combined."""
    import torch
    from torch.nn.functional import interpolate, pad

    (tmp_path / "chain.json").write_text(json.dumps(_chain()))
    workflow = read_workflow(tmp_path / "chain.json")
    chain = Chain(opened, workflow, check_workflow(workflow, opened.manifest), tmp_path, lambda request: request)
    pictures = [step.picture for _, step in chain.steps() if step.picture is not None]
    ids = [[side, side, 0, 0, side, side] for side in (SIDE, 2 * SIDE)]
    fox, snow, blurry = (
        reference.base_cond([(text, 1.0)], [(text, 1.0)], ids[0]) for text in ("a red fox", "snow", "blurry")
    )
    joined = torch.cat([fox.hidden, snow.hidden], dim=1)
    averaged = Cond(
        0.25 * joined + 0.75 * pad(snow.hidden, (0, 0, 0, snow.hidden.shape[1])),
        0.25 * fox.pooled + 0.75 * snow.pooled,
        fox.ids,
    )
    x = torch.zeros((1, 4, SIDE // 2, SIDE // 2))
    x = ksampler(reference.base.unet, normal(4), [averaged, snow], blurry, 4.0, x, _randn(3))
    x = interpolate(x, scale_factor=2.0, mode="bicubic")
    large = [Cond(cond.hidden, cond.pooled, torch.tensor([ids[1]], dtype=torch.float32)) for cond in (fox, blurry)]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    x = ksampler(reference.base.unet, denoised(3, 0.5), *large, 4.0, x, noise)
    pixels = ((reference.base.vae.decode(x / 0.13025).sample + 1.0) / 2.0).clamp(0, 1)
    pixels = interpolate(pixels, size=(SIDE, SIDE), mode="area")
    shown = (pixels[0].permute(1, 2, 0) * 255.0).to(torch.uint8).numpy()
    assert np.abs(np.asarray(pictures[1].image).astype(int) - shown).max() <= 1
    x = reference.base.vae.encode(pixels * 2.0 - 1.0).latent_dist.mean * 0.13025
    sides = [reference.refiner_cond([(text, 1.0)], [SIDE, SIDE, 0, 0, 6.0]) for text in ("a red fox", "blurry")]
    x = ksampler(reference.refiner.unet, denoised(5, 0.4), *sides, 4.0, x, _randn(7))
    np.testing.assert_allclose(chain.runs[0].final, x.numpy(), rtol=0, atol=TOLERANCE)
    assert [picture.image.size for picture in pictures] == [(SIDE, SIDE), (SIDE, SIDE)]
    whole = _chain()
    assert pictures[0].graph == {key: whole[key] for key in whole if key != "29"}
    later = ("12", "15", "16", "25", "26", "27", "28")
    assert pictures[1].graph == {key: whole[key] for key in whole if key not in later}
