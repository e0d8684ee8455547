"""Workflows as requests: what a bundle can do is mapped, what it cannot is refused by the name of its node."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.engines.manifest import LoraRecord, Manifest, Scheduler, Stage, Vae
from sdxl_trt.runtime.input_pictures import InputPicture
from sdxl_trt.runtime.request import Request, resolve
from sdxl_trt.runtime.workflow import TO_THE_END, Conditioning, Latents, Model, Sampling, Workflow
from sdxl_trt.runtime.workflow_request import workflow_request

SCHEDULER = Scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def _stage() -> Stage:
    vae = Vae(decoder="v", encoder=None, scaling_factor=0.13025, latent_channels=4, factor=8)
    return Stage(
        unet="u", text_encoders=(), vae=vae, scheduler=SCHEDULER, time_ids=(), sample_size=128, size_multiple=64,
        force_zeros_for_empty_prompt=True,
    )  # fmt: skip


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        format="f", format_version=1, generator="g", precision="fp16", components={}, tokenizers={}, base=_stage(),
        refiner=_stage(), loras=(LoraRecord(name="ink.safetensors", sha256="0" * 64, scale=0.8),),
    )  # fmt: skip


INK = (("sdxl\\ink.safetensors", 0.8),)
BASE = Sampling(
    "10", Model("base", INK), Conditioning("6", "a fox", "red", False, (2048, 4096), (2, 1), (512, 1024)),
    Conditioning("7", "bad", "bad", zeroed=True), 2**63, 50, 8.0, "euler", "normal", end=40, leftover_noise=True,
)  # fmt: skip
REFINER = Sampling(
    "11", Model("refiner"), Conditioning("15", "a fox", "a fox", False, (512, 1024), (0, 0), score=6.0),
    Conditioning("16", "bad", "bad", False, (512, 1024), (0, 0), score=6.0), 7, 50, 7.0, "euler", "normal",
    add_noise=False, start=40,
)  # fmt: skip
WORKFLOW = Workflow(Latents(1024, 512, 2, node="5"), (BASE, REFINER), "refiner")


def test_both_samplings_are_the_request_s(manifest: Manifest, caplog: Any) -> None:
    resolved = resolve(workflow_request(WORKFLOW, manifest), manifest)
    assert (resolved.compat, resolved.steps, resolved.spacing, resolved.sampler) == ("comfyui", 50, "normal", "euler")
    assert (resolved.width, resolved.height) == (1024, 512)
    assert (resolved.seeds, resolved.refiner_seeds) == ((2**63, 2**63), (7, 7))
    assert (resolved.guidance, resolved.refiner_guidance) == (8.0, 7.0)
    assert (resolved.base.start, resolved.base.stop, resolved.base.leftover_noise) == (0, 40, True)
    assert (resolved.refiner.start, resolved.refiner.stop, resolved.refiner.add_noise) == (40, 50, False)
    positive, negative = resolved.sides["base"]
    assert (positive.prompt.text, positive.prompt.text_2, negative.zeroed) == ("red", "a fox", True)
    assert positive.micro.original_size == (2048, 4096)
    assert (positive.micro.crop, positive.micro.target_size) == ((2, 1), (512, 1024))
    assert negative.micro.original_size == (512, 1024), "without sizes of its own, those of the latents"
    positive, negative = resolved.sides["refiner"]
    assert (positive.micro.aesthetic_score, negative.micro.negative_aesthetic_score) == (6.0, 6.0)
    assert caplog.records == []


def test_the_base_alone(manifest: Manifest, caplog: Any) -> None:
    alone = replace(WORKFLOW, samplings=(replace(BASE, end=TO_THE_END, leftover_noise=False),), vae="base")
    resolved = resolve(workflow_request(alone, manifest), manifest)
    assert (resolved.refiner, resolved.base.stop) == (None, 50)
    assert caplog.records == []


def test_the_editor_s_default_graph_stays_the_no_op_that_it_is(manifest: Manifest, caplog: Any) -> None:
    base, refiner = replace(BASE, steps=20, end=32), replace(REFINER, steps=20, start=32)
    resolved = resolve(workflow_request(replace(WORKFLOW, samplings=(base, refiner)), manifest), manifest)
    assert (resolved.base.stop, resolved.refined) == (20, False)
    assert "does nothing" in caplog.text


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "sampler": ({"sampler": "dpm_adaptive"}, {}, "node 10: sampler_name 'dpm_adaptive' is unknown here; .*euler"),
    "schedule": ({}, {"schedule": "AYS"}, "node 11: scheduler 'AYS' is unknown here; .*normal"),
    "denoise": ({}, {"denoise": 0.0}, "node 11: denoise 0 is outside 0 to 1"),
    "a denoise and a start": ({"denoise": 0.3, "start": 4}, {}, "give one of them"),
    "steps": ({"steps": 40}, {}, "nodes 10 and 11: steps 40 and 50"),
    "schedules": ({"schedule": "karras"}, {}, "nodes 10 and 11: schedule karras and normal"),
    "grids": ({"sampler": "dpm_2"}, {}, "nodes 10 and 11: samplers dpm_2 and euler are on different grids"),
    "checkpoint": ({}, {"model": Model("base")}, "nodes 10 and 11: sample with one checkpoint twice"),
    "refiner's LoRA": ({}, {"model": Model("refiner", INK)}, "node 11: has a LoRA on the refiner"),
    "strength": ({"model": Model("base", (("ink.safetensors", 1.0),))}, {},
                 "node 10: LoRA ink.safetensors at strength 1 is not in the bundle; .*--lora ink.safetensors:1"),
    "twice": ({"model": Model("base", INK + INK)}, {}, "is not in the bundle"),
    "seed": ({"seed": -1}, {}, "--seed -1"),
    "start": ({}, {"start": -4}, "--refiner-start-step -4"),
}  # fmt: skip


@pytest.mark.parametrize(("base", "refiner", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_run_is_named(
    manifest: Manifest, base: dict[str, Any], refiner: dict[str, Any], words: str
) -> None:
    workflow = replace(WORKFLOW, samplings=(replace(BASE, **base), replace(REFINER, **refiner)))
    with pytest.raises(UsageError, match=words):
        resolve(workflow_request(workflow, manifest), manifest)


def test_chains_pictures_and_bundles_that_do_not_fit_are_named(manifest: Manifest) -> None:
    third = replace(WORKFLOW, samplings=(BASE, REFINER, replace(REFINER, node="12")))
    alone = msgspec.structs.replace(manifest, refiner=None)
    other = msgspec.structs.replace(_stage(), vae=msgspec.structs.replace(_stage().vae, decoder="own"))
    for workflow, bundle, words in (
        (third, manifest, "node 12: is a sampler too many"),
        (WORKFLOW, alone, "node 11: takes a refiner, but the bundle has none"),
        (replace(WORKFLOW, vae="base"), msgspec.structs.replace(manifest, refiner=other), "decodes with the base's"),
    ):
        with pytest.raises(UsageError, match=words):
            workflow_request(workflow, bundle)


@pytest.fixture
def picture(tmp_path: Path) -> Workflow:
    """A workflow that loads a picture, which lies in `tmp_path`; a link to it beside."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (128, 64)).save(tmp_path / "pictures" / "in.png")
    Image.new("RGB", (128, 64)).save(tmp_path.parent / f"{tmp_path.name}-out.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pictures" / "in.png")
    np.save(tmp_path / "latents.npy", np.zeros((1, 4, 8, 16), np.float32))
    return replace(WORKFLOW, latents=Latents(image="pictures/in.png", vae="base", batch=2, node="5"))


def test_a_picture_is_loaded_from_the_workflow_s_folder(manifest: Manifest, picture: Workflow, tmp_path: Path) -> None:
    for name in ("pictures/in.png", "pictures\\in.png", "pictures/in.png [input]"):
        named = replace(picture, latents=replace(picture.latents, image=name))
        request = workflow_request(named, manifest, tmp_path)
        assert isinstance(request.image, InputPicture)
        assert (request.image.size, request.count, request.strength) == ((64, 128), 2, 1.0)
        assert (request.width, request.height, request.refiner_strength) == (None, None, None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other.png", "'other.png' is not in the workflow's folder; put it into"),
        ("../OUT", "no plain name"), ("/etc/passwd", "no plain name"), ("link.png", "no plain name"), ("", "no plain"),
        ("..\\OUT", "no plain name"), ("pictures", "is not in the workflow's folder"), ("a\0b", "no plain name"),
        ("x" * 5000, "no plain name"), ("latents.npy", "is no picture"),
    ],
)  # fmt: skip
def test_no_picture_leads_out_of_the_folder(
    manifest: Manifest, picture: Workflow, tmp_path: Path, name: str, words: str
) -> None:
    named = replace(picture, latents=replace(picture.latents, image=name.replace("OUT", f"{tmp_path.name}-out.png")))
    with pytest.raises(UsageError, match=rf"node 5 \(LoadImage\): .*{words}"):
        workflow_request(named, manifest, tmp_path)


def test_a_sampler_s_denoise_is_its_own(manifest: Manifest, picture: Workflow, tmp_path: Path) -> None:
    base = replace(BASE, start=0, end=TO_THE_END, leftover_noise=False, denoise=0.5)
    refiner = replace(REFINER, start=0, end=TO_THE_END, add_noise=True, denoise=0.25)
    request = workflow_request(replace(picture, samplings=(base, refiner)), manifest, tmp_path)
    assert (request.strength, request.refiner_strength) == (0.5, 0.25)
    resolved = resolve(request, _encoding(manifest))
    assert [schedule.steps for schedule in (resolved.schedule, resolved.refiner_schedule)] == [50, 50]
    assert resolved.refiner_schedule.sigmas[0] < resolved.schedule.sigmas[0] < 14
    assert (resolved.base.start, resolved.base.stop, resolved.refine) == (0, 50, False)
    assert (resolved.refiner.start, resolved.refiner.stop, resolved.refiner.add_noise) == (0, 50, True)
    # Empty latents that are not noised all through are ComfyUI's too.
    empty = resolve(workflow_request(replace(WORKFLOW, samplings=(base,), vae="base"), manifest), manifest)
    np.testing.assert_array_equal(empty.schedule.sigmas, resolved.schedule.sigmas)


def test_one_sampler_with_a_score_is_the_refiner_s(manifest: Manifest, picture: Workflow, tmp_path: Path) -> None:
    alone = replace(REFINER, start=30, end=45, add_noise=True, leftover_noise=True)
    workflow = replace(picture, samplings=(alone,), latents=replace(picture.latents, vae="refiner"))
    resolved = resolve(workflow_request(workflow, manifest, tmp_path), _encoding(manifest))
    assert (resolved.refine, resolved.base.steps) == (True, 0)
    assert (resolved.refiner.start, resolved.refiner.stop, resolved.refiner.leftover_noise) == (30, 45, True)
    assert (resolved.first.add_noise, resolved.refiner.add_noise) == (True, False)
    assert resolved.sides["refiner"][0].micro.aesthetic_score == 6.0
    no_refiner = msgspec.structs.replace(manifest, refiner=None)
    with pytest.raises(UsageError, match="node 11: takes a refiner"):
        workflow_request(workflow, no_refiner, tmp_path)
    other = msgspec.structs.replace(_stage(), vae=msgspec.structs.replace(_stage().vae, decoder="own"))
    apart = msgspec.structs.replace(manifest, refiner=other)
    assert workflow_request(picture, apart, tmp_path).image
    with pytest.raises(UsageError, match="another checkpoint's VAE"):
        workflow_request(replace(picture, latents=replace(picture.latents, vae="refiner")), apart, tmp_path)


def _encoding(manifest: Manifest) -> Manifest:
    """Return the manifest of a bundle that has an encoder."""
    stages = {
        name: msgspec.structs.replace(stage, vae=msgspec.structs.replace(stage.vae, encoder="e"))
        for name, stage in manifest.stages().items()
    }
    return msgspec.structs.replace(manifest, **stages)


def test_a_lora_that_only_the_bundle_has_is_told(manifest: Manifest, caplog: Any) -> None:
    plain = replace(WORKFLOW, samplings=(replace(BASE, model=Model("base")), REFINER))
    assert isinstance(workflow_request(plain, manifest), Request)
    assert "LoRA ink.safetensors at strength 0.8" in caplog.text


NUMBERS = st.integers(-(2**64), 2**64) | st.integers(-3, 60)
REALS = st.floats(-(2.0**64), 2.0**64)
PAIRS_OF_NUMBERS = st.tuples(NUMBERS, NUMBERS)


def _samplings(sampling: Sampling) -> st.SearchStrategy[Sampling]:
    told = st.builds(Conditioning, st.just("6"), st.text(), st.text(), st.booleans(), PAIRS_OF_NUMBERS,
                     st.none() | PAIRS_OF_NUMBERS, st.none() | PAIRS_OF_NUMBERS, st.none() | REALS)  # fmt: skip
    return st.builds(
        replace, st.just(sampling), positive=st.just(sampling.positive) | told, seed=NUMBERS, cfg=REALS,
        steps=st.just(50) | NUMBERS, start=NUMBERS, end=NUMBERS, add_noise=st.booleans(), leftover_noise=st.booleans(),
        denoise=st.just(1.0) | REALS, sampler=st.sampled_from(["euler", "dpm_2", ""]),
    )  # fmt: skip


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(base=_samplings(BASE), refiner=_samplings(REFINER), sizes=st.just((512, 512, 1)) | st.tuples(*[NUMBERS] * 3))
def test_any_numbers_are_resolved_or_refused(
    manifest: Manifest, base: Sampling, refiner: Sampling, sizes: tuple[int, int, int]
) -> None:
    for samplings in ((base,), (base, refiner)):
        with contextlib.suppress(UsageError):
            resolve(workflow_request(Workflow(Latents(*sizes), samplings, "refiner"), manifest), manifest)
