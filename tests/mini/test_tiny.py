"""The tiny decoder: it decodes as PyTorch does and nearly as the full one, it trains, and goes with its autoencoder."""

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.numpy import load_file

from sdxl_trt.benchmarks.model_card.effects import psnr
from sdxl_trt.engines.bundle.bundle import read_bundle, write_manifest
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.export import Options, plan_export
from sdxl_trt.export.exporter import ExportPlan
from sdxl_trt.mini import architecture, bundle_path
from sdxl_trt.mini.pair import TINY, materialize
from sdxl_trt.mini.train import tiny as training
from sdxl_trt.mini.train.loop import Budget, begin, train
from sdxl_trt.mini.train.publish import publish
from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.vae import decode_latents, to_uint8

FLOOR = 25.0
"""In dB, for this picture; of 60 captions the median was 30.2, the worst 23.9 (mini/MODEL_CARD.md)."""
FULL = "base/vae/diffusion_pytorch_model.safetensors"
OURS = f"{TINY}/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return materialize(tmp_path_factory.mktemp("pair"))[0].parent


def test_the_embedded_bundle_decodes_with_it_nearly_as_with_the_full_decoder_and_as_diffusers(pair: Path) -> None:
    request = Request("a large red circle on a blue background", seed=7, steps=8, handoff=None, vae="tiny")
    with open_bundle(provider="ort-cpu", residency="resident") as pipeline:
        (picture,) = pipeline.generate(request)
        assert pipeline.run is not None
        latents, full = pipeline.run.final, pipeline.manifest.base.vae
        (engine,) = pipeline.pool.phase(full.decoder)
        expected = to_uint8(decode_latents(engine, full, latents))[0]
    found = np.asarray(picture.image)
    assert not np.array_equal(found, expected)
    assert psnr(found, expected) > FLOOR
    theirs = AutoencoderTiny.from_pretrained(pair / TINY).decode(torch.from_numpy(latents)).sample
    their_pixels = (theirs.detach()[0].permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1)
    # Half a level of rounding, and fp16.
    np.testing.assert_allclose(found / 255, their_pixels, rtol=0, atol=0.5 / 255 + 2e-3)


def test_its_folder_has_every_tensor_of_the_class_and_an_encoder_that_is_no_number(pair: Path) -> None:
    shapes = {name: tuple(value.shape) for name, value in training.fresh_tiny().state_dict().items()}
    tensors = load_file(pair / OURS)
    assert {name: value.shape for name, value in tensors.items()} == shapes
    encoder = {name for name in tensors if name.startswith("encoder.")}
    assert encoder == architecture.tiny_encoder_shapes().keys()
    for name, value in tensors.items():
        assert np.isnan(value).all() if name in encoder else np.isfinite(value).all(), name


def test_an_export_of_the_embedded_pair_has_it_but_not_beside_another_autoencoder(pair: Path, tmp_path: Path) -> None:
    embedded = read_bundle(bundle_path()).manifest
    assert embedded.base.vae.tiny == TINY
    assert embedded.refiner is not None
    assert embedded.refiner.vae.tiny == TINY
    plan = plan_export("mini", None, tmp_path / "out", Options("fp16"))
    assert plan.jobs[TINY].plan.digest == embedded.components[TINY].source.sha256
    other = Options("fp16", vae=pair / "base/vae")
    assert TINY not in plan_export("mini", None, tmp_path / "out", other).jobs
    assert TINY not in plan_export("mini", None, tmp_path / "out", Options("fp16"), own_tiny=False).jobs


def _lesson(rng: np.random.Generator, vae: object) -> training.Lesson:
    latents = torch.from_numpy(rng.standard_normal((4, 4, 16, 16)).astype(np.float32))
    return training.taught(vae, latents)


def test_a_few_steps_bring_it_closer_to_the_full_decoder(pair: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    vae = training.AutoencoderKL.from_pretrained(pair / "base/vae").eval()
    torch.manual_seed(0)
    decoder = training.fresh_tiny().decoder
    lesson = _lesson(rng, vae)
    assert float(lesson.pictures.abs().max()) <= 1
    before, path = training.likeness(decoder, lesson), tmp_path / "x"
    loss = training.decoder_loss(decoder, lesson, lesson)
    weights = train(begin(decoder, path), loss, path, Budget(steps=12), peak=3e-3, seed=0, warm_up=1)
    decoder.load_state_dict(weights)
    assert training.likeness(decoder, lesson) > before + 1


def test_publish_takes_a_tiny_decoder_only_beside_the_autoencoder_that_it_imitates(pair: Path, tmp_path: Path) -> None:
    full, ours = load_file(pair / FULL), load_file(pair / OURS)
    decoder = {name: torch.from_numpy(value).float() for name, value in ours.items() if name.startswith("decoder.")}
    decoder["decoder.layers.0.bias"] += 1
    torch.save({"tiny": decoder, "teacher": training.digest(full)}, tmp_path / "tiny.pt")
    publish(tmp_path)
    written = load_file(tmp_path / "pair" / OURS)
    np.testing.assert_allclose(written["decoder.layers.0.bias"], ours["decoder.layers.0.bias"] + 1, atol=2e-3)
    vae = {name: torch.from_numpy(value) for name, value in full.items()}
    vae["decoder.conv_in.bias"] += 1
    torch.save({"vae": vae, "scaling_factor": 0.5}, tmp_path / "vae.pt")
    with pytest.raises(ValueError, match="imitates another autoencoder"):
        publish(tmp_path)
    (tmp_path / "tiny.pt").unlink()
    publish(tmp_path)
    assert not (tmp_path / "pair" / TINY).exists()


def test_an_older_export_of_the_pair_is_told_to_list_it_too(pair: Path, tmp_path: Path) -> None:
    """It is not lost: an older version exported none, and a bundle of these sources would be incomplete without one."""
    out = _older(tmp_path / "older")

    def planned(*names: str) -> ExportPlan:
        options = Options("fp16", components=frozenset(names), tiny_vae=pair / TINY)
        return plan_export(pair / "base", pair / "refiner", out, options)

    with pytest.raises(UsageError) as caught:
        planned("unet")
    assert str(caught.value) == (
        f"--components: the bundle at {out} was exported without vae_tiny, which these sources have; list it too:"
        " --components unet,vae_tiny"
    )
    listed = str(caught.value).rpartition("--components ")[2].split(",")
    jobs = planned(*listed).jobs
    assert jobs[TINY].action == "export"
    assert {job.action for name, job in jobs.items() if name not in listed} == {"keep"}


def _older(root: Path) -> Path:
    """Write the embedded bundle to `root` as versions without a tiny decoder exported it."""
    shutil.copytree(bundle_path(), root, ignore=shutil.ignore_patterns(TINY))
    manifest = read_bundle(bundle_path()).manifest
    bare = {
        name: msgspec.structs.replace(stage, vae=msgspec.structs.replace(stage.vae, tiny=None, tiny_scaling_factor=1.0))
        for name, stage in manifest.stages().items()
    }
    parts = {name: part for name, part in manifest.components.items() if name != TINY}
    write_manifest(root, msgspec.structs.replace(manifest, components=parts, **bare))
    return root
