"""Embeddings in prompts against diffusers' load_textual_inversion, and against ComfyUI's rules written down again."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.pipeline.pipeline import Pipeline

# diffusers' own warning: it passes torch tensors to np.array.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]

CONDITION_TOLERANCE, LATENTS_TOLERANCE = 1e-4, 1e-3
STEPS, HANDOFF, SEED, SIDE = 5, 0.6, 11, 32
WIDTHS = {"outline": {"clip_l": 32, "clip_g": 48}, "apart": {"clip_l": 32, "clip_g": 48}}
COUNTS = {"one": 1, "four": 4, "eight": 8, "second": 2}
FOLDER = "embeddings"


def _files() -> dict[str, dict[str, np.ndarray]]:
    """Return the tensors of every file; both pairs' bases have encoders of the same widths."""
    rng = np.random.default_rng(5)
    files = {
        name: {key: 0.5 * rng.standard_normal((count, width), dtype=np.float32)
               for key, width in WIDTHS["outline"].items()}
        for name, count in COUNTS.items()
    }  # fmt: skip
    return files | {"g_only": {"clip_g": files["four"]["clip_g"]}, "l_only": {"clip_l": files["four"]["clip_l"]}}


FILES = _files()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(FOLDER)
    for name, tensors in FILES.items():
        save_file(tensors, root / f"{name}.safetensors")
    return root


@pytest.fixture(scope="module")
def opened(pairs: Callable[[str], Any]) -> Iterator[Callable[[str], Pipeline]]:
    pipelines: dict[str, Pipeline] = {}

    def get(name: str) -> Pipeline:
        if name not in pipelines:
            pipelines[name] = open_bundle(pairs(name).bundle, residency="resident")
        return pipelines[name]

    yield get
    for pipeline in pipelines.values():
        pipeline.pool.close()


@dataclass(frozen=True)
class Reference:
    """What diffusers makes: (hidden, pooled) of base and refiner by side, and the latents at the handoff and last."""

    base: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    refiner: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    handoff: np.ndarray
    final: np.ndarray


def _load(pipeline: Any, encoders: Mapping[str, tuple[Any, Any]], names: list[str]) -> None:
    import torch

    for name in names:
        for key, (encoder, tokenizer) in encoders.items():
            if key in FILES[name]:
                pipeline.load_textual_inversion(
                    torch.from_numpy(FILES[name][key]), token=f"embedding:{name}", text_encoder=encoder,
                    tokenizer=tokenizer,
                )  # fmt: skip


def _sides(pipeline: Any, prompt: str, negative: str) -> Any:
    encoded = pipeline.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=negative
    )
    hidden, negative_hidden, pooled, negative_pooled = (each[0].numpy() for each in encoded)
    return (hidden, pooled), (negative_hidden, negative_pooled)


def _diffusers(pair: Any, prompt: str, negative: str, names: list[str]) -> Reference:
    """Run base and refiner with the embeddings `names`, loaded in this order, on the prompts as they are written."""
    import torch
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Without a dtype, transformers loads encoders that were saved in it in fp16.
        base = StableDiffusionXLPipeline.from_pretrained(pair.base, torch_dtype=torch.float32)
        refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(pair.refiner, torch_dtype=torch.float32)
        for pipeline in (base, refiner):
            pipeline.set_progress_bar_config(disable=True)
        second = (base.text_encoder_2, base.tokenizer_2)
        _load(base, {"clip_l": (base.text_encoder, base.tokenizer), "clip_g": second}, names)
        refiner_fits = refiner.text_encoder_2.config.hidden_size == WIDTHS["outline"]["clip_g"]
        _load(refiner, {"clip_g": (refiner.text_encoder_2, refiner.tokenizer_2)} if refiner_fits else {}, names)
        generator = [torch.Generator().manual_seed(SEED)]
        settings: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative, "num_inference_steps": STEPS,
                                    "generator": generator, "guidance_scale": 5.0, "output_type": "latent"}  # fmt: skip
        handed = base(**settings, width=SIDE, height=SIDE, denoising_end=HANDOFF).images
        final = refiner(**settings, image=handed, denoising_start=HANDOFF).images
        sides = (_sides(base, prompt, negative), _sides(refiner, prompt, negative))
    return Reference(*sides, handed.numpy(), final.numpy())


def _check(pipeline: Pipeline, request: Request, reference: Reference) -> None:
    job = pipeline.start(request)
    list(pipeline.encode([job]))
    for stage, expected in (("base", reference.base), ("refiner", reference.refiner)):
        for side, (hidden, pooled) in zip(job.embeds[stage], expected, strict=True):
            np.testing.assert_allclose(side[0].hidden, hidden, rtol=0, atol=CONDITION_TOLERANCE)
            np.testing.assert_allclose(side[0].pooled, pooled, rtol=0, atol=CONDITION_TOLERANCE)
    list(pipeline.generate(request))
    run = pipeline.run
    assert run is not None
    np.testing.assert_allclose(run.handoff_latents, reference.handoff, rtol=0, atol=LATENTS_TOLERANCE)
    np.testing.assert_allclose(run.final, reference.final, rtol=0, atol=LATENTS_TOLERANCE)


PROMPTS = {
    "one vector": ("a red embedding:one fox in the snow", "", ["one"]),
    "four vectors and a comma": ("embedding:four, a red fox", "blurry", ["four"]),
    "in the negative": ("a red fox", "blurry, embedding:four", ["four"]),
    "in brackets": ("a red fox (embedding:four)", "", ["four"]),
    "cut through the vectors": ("a " * 73 + "embedding:four fox", "a " * 75 + "embedding:one", ["four", "one"]),
    "several": ("embedding:four fox embedding:second embedding:four", "embedding:one", ["four", "second", "one"]),
    "the last one cut off": ("embedding:second " + "a " * 80 + "embedding:four", "", ["second", "four"]),
    "for one encoder": ("a embedding:g_only fox", "embedding:l_only star", ["g_only", "l_only"]),
    "with its ending": ("a red fox embedding:four.safetensors", "", []),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_a_run_is_that_of_load_textual_inversion(
    name: str, pairs: Callable[[str], Any], opened: Callable[[str], Pipeline], folder: Path
) -> None:
    prompt, negative, names = PROMPTS[name]
    request = Request(prompt, negative=negative, steps=STEPS, handoff=HANDOFF, seed=SEED, width=SIDE, height=SIDE,
                      embedding_dir=folder)  # fmt: skip
    written = prompt.replace(".safetensors", "")
    reference = _diffusers(pairs("outline"), written, negative, names or ["four"])
    _check(opened("outline"), request, reference)
