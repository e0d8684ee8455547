"""Runs that decode with a tiny decoder against diffusers' pipelines with the same AutoencoderTiny."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from small_models.additions import save_tiny_vae

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.errors import SourceError, UsageError
from sdxl_trt.export import Options, export_bundle
from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.cli.preview import Preview
from sdxl_trt.runtime.comfyui.checks import experts
from sdxl_trt.runtime.comfyui.reader import read_workflow
from sdxl_trt.runtime.comfyui.requests import pair_request
from sdxl_trt.runtime.pipeline.pipeline import Pipeline
from sdxl_trt.runtime.pipeline.run import Step
from sdxl_trt.runtime.vae.decode import decode_latents

# diffusers and numpy 2 disagree on how a tensor becomes an array.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
HEIGHT, WIDTH, STEPS, SEED = 32, 48, 4, 7
TOLERANCE = 1e-3
SCALING = 0.7
"""Unlike that of any autoencoder of the pair, and unlike TAESD's, which is 1."""


class Made(NamedTuple):
    """The sources of a pair with a tiny decoder, and the bundle made of them."""

    base: Path
    refiner: Path
    tiny: Path
    bundle: Path


@pytest.fixture(scope="module")
def made(pairs: Callable[[str], Any], convert_once: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    pair, root = pairs("outline"), tmp_path_factory.mktemp("tiny")
    save_tiny_vae(root / "tiny", pair.base / "vae", scaling=SCALING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdxl_trt.export.exporter.convert_component", convert_once)
        export_bundle(pair.base, pair.refiner, root / "bundle", Options(precision="fp32", tiny_vae=root / "tiny"))
    return Made(pair.base, pair.refiner, root / "tiny", root / "bundle")


@pytest.fixture(scope="module")
def pipeline(made: Made) -> Iterator[Pipeline]:
    with open_bundle(made.bundle, provider="ort-cpu", residency="resident") as opened:
        yield opened


def _theirs(made: Made, handoff: float | None) -> Any:
    """Return the pixels (1, h, w, 3) from 0 to 1 of diffusers' pipelines."""
    from diffusers import AutoencoderTiny, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    tiny = AutoencoderTiny.from_pretrained(made.tiny)
    base = StableDiffusionXLPipeline.from_pretrained(made.base, vae=tiny, add_watermarker=False)
    base.set_progress_bar_config(disable=True)
    common: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 5.0,
                              "generator": torch.Generator().manual_seed(SEED)}  # fmt: skip
    if handoff is None:
        return base("a red fox", width=WIDTH, height=HEIGHT, output_type="np", **common).images
    latents = base("a red fox", width=WIDTH, height=HEIGHT, output_type="latent", denoising_end=handoff, **common)
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(made.refiner, vae=tiny, add_watermarker=False)
    refiner.set_progress_bar_config(disable=True)
    return refiner("a red fox", image=latents.images, denoising_start=handoff, output_type="np", **common).images


def _request(**changes: Any) -> Request:
    usual = {"seed": SEED, "steps": STEPS, "width": WIDTH, "height": HEIGHT, "guidance": 5.0, "vae": "tiny"}
    return Request("a red fox", **{**usual, **changes})


@pytest.mark.parametrize("handoff", [None, 0.5], ids=["base alone", "base and refiner"])
def test_the_picture_is_that_of_diffusers(made: Made, pipeline: Pipeline, handoff: float | None) -> None:
    expected = _theirs(made, handoff)
    (picture,) = pipeline.generate(_request(handoff=handoff))
    assert pipeline.run is not None
    vae = pipeline.vae(pipeline.run.request)
    (engine,) = pipeline.pool.phase(vae.decoder)
    sample = decode_latents(engine, vae, pipeline.run.final)
    found = np.clip(sample.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1)
    assert np.abs(pipeline.run.final).max() > 2  # the decoder's own clamp has an effect
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(np.asarray(picture.image) / 255, expected[0], rtol=0, atol=TOLERANCE + 0.5 / 255)


@pytest.mark.slow
def test_verification_feeds_it_latents_at_its_own_scale(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(made.bundle, out)
    export_bundle(made.base, made.refiner, out, Options(precision="fp32", tiny_vae=made.tiny, verify=True))
    report = json.loads((out / "verify.json").read_bytes())
    assert {"vae_decoder", "vae_tiny"} <= report["components"].keys()


def test_the_full_decoder_stays_the_default(pipeline: Pipeline) -> None:
    (full,), (tiny,) = (list(pipeline.generate(_request(**changes))) for changes in ({"vae": "full"}, {}))
    (usual,) = pipeline.generate(Request("a red fox", seed=SEED, steps=STEPS, width=WIDTH, height=HEIGHT))
    assert np.array_equal(usual.image, full.image)
    assert not np.array_equal(full.image, tiny.image)


def test_a_bundle_without_one_says_what_to_do(pairs: Callable[[str], Any]) -> None:
    with (
        open_bundle(pairs("outline").bundle, provider="ort-cpu") as without,
        pytest.raises(UsageError, match="no tiny decoder; export it with --tiny-vae"),
    ):
        without.start(_request())


def test_the_memory_estimate_counts_the_decoder_that_runs(made: Made) -> None:
    for request, name in ((_request(), "vae_tiny"), (_request(vae="full"), "vae_decoder")):
        with open_bundle(made.bundle, provider="ort-cpu", plan_for=request) as opened:
            plan = opened.pool._estimate(residency="swap")
        assert plan.phases[-1].components == (name,)


def test_its_source_must_be_a_tiny_autoencoder_of_these_latents(made: Made, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is a AutoencoderKL; --tiny-vae takes an AutoencoderTiny"):
        export_bundle(made.base, None, tmp_path / "out", Options(tiny_vae=made.base / "vae"))
    config = json.loads((made.base / "vae/config.json").read_text())
    other = tmp_path / "vae"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {"block_out_channels": [8] * 5}))
    save_tiny_vae(tmp_path / "tiny", other)
    with pytest.raises(SourceError, match="its latents have 4 channels, of 16 pixels each"):
        export_bundle(made.base, None, tmp_path / "out", Options(tiny_vae=tmp_path / "tiny"))
    assert not (tmp_path / "out").exists()


def test_its_preview_is_what_diffusers_decodes(made: Made, tmp_path: Path, rng: np.random.Generator) -> None:
    from diffusers import AutoencoderTiny

    latents = 3 * rng.standard_normal((2, 4, 6, 10)).astype(np.float32)
    path = tmp_path / "x.png"
    with Preview(path, read_bundle(made.bundle), "tiny") as preview:
        preview.show(Step("base", 2, 2, slice(0, 2), latents=latents, denoised=latents))
        with Image.open(path) as image:
            found = np.asarray(image, np.float64) / 255
    expected = AutoencoderTiny.from_pretrained(made.tiny).decode(torch.from_numpy(latents) / SCALING).sample
    beside = np.concatenate([*(expected.detach().numpy() / 2 + 0.5).clip(0, 1)], axis=2).transpose(1, 2, 0)
    np.testing.assert_allclose(found, beside, rtol=0, atol=TOLERANCE + 0.5 / 255)
    assert not path.exists()


@pytest.mark.parametrize(("name", "vae"), [("taesdxl", "tiny"), ("taesdxl.safetensors", "tiny"), ("other", "full")])
def test_a_workflow_names_it_as_comfyui_does(made: Made, tmp_path: Path, name: str, vae: str) -> None:
    manifest = read_bundle(made.bundle).manifest
    with open_bundle(made.bundle, provider="ort-cpu") as opened:
        (picture,) = opened.generate(_request(compat="comfyui", vae="tiny", handoff=None))
        assert picture.graph is not None
    graph = {key: dict(node) for key, node in picture.graph.items()}
    (loader,) = (node for node in graph.values() if node["class_type"] == "VAELoader")
    assert loader["inputs"] == {"vae_name": "taesdxl"}
    loader["inputs"] = {"vae_name": name}
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(graph))
    workflow = read_workflow(path)
    request = pair_request(workflow, manifest, experts(workflow, manifest))
    assert request is not None
    assert request.vae == vae
