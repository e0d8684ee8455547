"""Workflows as requests: what a bundle supports is mapped, and what it does not is refused by node."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_trt.engines.bundle.manifest import LoraRecord, Manifest, Scheduler, Stage, Vae
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.comfyui.checks import experts
from sdxl_trt.runtime.comfyui.requests import (
    check_workflow,
    load_channel,
    load_image,
    pair_request,
    settle_pair,
    with_seed,
)
from sdxl_trt.runtime.comfyui.workflow import (
    TO_THE_END,
    Clip,
    Conditioning,
    Decoded,
    Empty,
    Encoded,
    Loaded,
    LoraNode,
    Mask,
    Mix,
    Model,
    Output,
    Repeated,
    Sampled,
    Sampling,
    VaeName,
    Workflow,
)
from sdxl_trt.runtime.images.inputs import InputPicture
from sdxl_trt.runtime.request.request import Request
from sdxl_trt.runtime.request.resolve import resolve_request

SCHEDULER = Scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def workflow_request(workflow: Workflow, manifest: Manifest, folder: Path | None = None) -> Request:
    request = pair_request(workflow, manifest, check_workflow(workflow, manifest), folder)
    if request is None:
        raise UsageError("it takes a chain of runs")
    return request


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


INK = (LoraNode("sdxl\\ink.safetensors", 0.8, "2"),)
CLIP = Clip("base", INK)
BASE = Sampling(
    "10", Model("base", INK), (Conditioning("6", "a fox", "red", CLIP, (2048, 4096), (2, 1), (512, 1024)),),
    (Conditioning("7", "bad", "bad", CLIP, mixes=(Mix("zero"),)),), 2**63, 50, 8.0, "euler", "normal", end=40,
    leftover_noise=True,
)  # fmt: skip
REFINER = Sampling(
    "11", Model("refiner"), (Conditioning("15", "a fox", "a fox", Clip("refiner"), (512, 1024), (0, 0), score=6.0),),
    (Conditioning("16", "bad", "bad", Clip("refiner"), (512, 1024), (0, 0), score=6.0),), 7, 50, 7.0, "euler", "normal",
    add_noise=False, start=40,
)  # fmt: skip
EMPTY = Empty(1024, 512, 2, node="5")


def _workflow(*samplings: Sampling, start: Any = EMPTY, vae: str = "refiner") -> Workflow:
    latents = start
    for sampling in samplings:
        latents = Sampled(latents, sampling)
    return Workflow((Output(Decoded(latents, VaeName(vae), node="17"), "x", "19"),))


WORKFLOW = _workflow(BASE, REFINER)


def test_one_request_has_the_settings_of_both_samplers(manifest: Manifest, caplog: Any) -> None:
    resolved = resolve_request(workflow_request(WORKFLOW, manifest), manifest)
    assert (resolved.request.compat, resolved.request.steps, resolved.request.schedule, resolved.request.sampler) == (
        "comfyui",
        50,
        "normal",
        "euler",
    )
    assert (resolved.width, resolved.height) == (1024, 512)
    assert (resolved.seeds, resolved.refiner_seeds) == ((2**63, 2**63), (7, 7))
    assert (resolved.request.guidance, resolved.refiner_guidance) == (8.0, 7.0)
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


def test_the_base_alone_is_one_request(manifest: Manifest, caplog: Any) -> None:
    alone = _workflow(replace(BASE, end=TO_THE_END, leftover_noise=False), vae="base")
    resolved = resolve_request(workflow_request(alone, manifest), manifest)
    assert (resolved.refiner, resolved.base.stop) == (None, 50)
    assert caplog.records == []


def test_the_idle_refiner_of_the_editors_default_graph_stays_idle(manifest: Manifest, caplog: Any) -> None:
    base, refiner = replace(BASE, steps=20, end=32), replace(REFINER, steps=20, start=32)
    resolved = resolve_request(workflow_request(_workflow(base, refiner), manifest), manifest)
    assert (resolved.base.stop, resolved.uses_refiner) == (20, False)
    assert "does nothing" in caplog.text


TWICE = replace(BASE, model=Model("base", INK + INK))
OTHER_CLIP = replace(BASE, positive=(replace(BASE.positive[0], clip=Clip("other", INK)),))
NO_LORA = replace(BASE, positive=(replace(BASE.positive[0], clip=Clip("base")),))
BASE_ENCODER = replace(
    REFINER,
    model=Model("a refiner"),
    positive=(replace(REFINER.positive[0], clip=Clip("a refiner"), encoder="CLIPTextEncodeSDXL"),),
    negative=(Conditioning("16", "", ""),),
)
REFUSED: dict[str, tuple[Sampling, Sampling, str]] = {
    "sampler": (replace(BASE, sampler="dpm_adaptive"), REFINER,
                "node 10: sampler_name 'dpm_adaptive' is not supported; .*euler"),
    "schedule": (BASE, replace(REFINER, schedule="AYS"), "node 11: scheduler 'AYS' is not supported; .*normal"),
    "denoise": (BASE, replace(REFINER, denoise=0.0), "node 11: denoise 0 is outside 0 to 1"),
    "a denoise and a start": (replace(BASE, denoise=0.3, start=4), REFINER, "give one of them"),
    "refiner's LoRA": (BASE, replace(REFINER, model=Model("refiner", INK)),
                       "node 2 .LoraLoader.: LoRA ink.safetensors at strength 0.8 is not .*--lora-dir DIR"),
    "refiner's CLIP": (BASE, replace(REFINER, negative=(replace(REFINER.negative[0], clip=Clip("refiner", INK)),)),
                       "node 2 .LoraLoader.: LoRA ink.safetensors .*--lora-dir DIR"),
    "base's encoder on the refiner": (BASE, BASE_ENCODER, "node 15 .*: is for the base's two encoders"),
    "strength": (replace(BASE, model=Model("base", (LoraNode("ink.safetensors", 1.0),))), REFINER,
                 "LoRA ink.safetensors at strength 1, 0.8 on .*the bundle has it at 0.8.*--lora ink.safetensors:1:0.8"),
    "twice": (TWICE, REFINER, "LoRA ink.safetensors at strength 1.6, 0.8 on the text encoders, is not in the bundle"),
    "the model's alone": (NO_LORA, REFINER, "node 10 with the prompt of node 6: .*--lora ink.safetensors:0.8:0"),
    "another CLIP": (OTHER_CLIP, REFINER, "node 6: its CLIP comes from 'other', but node 10 samples with 'base'"),
    "third checkpoint": (replace(BASE, model=Model("third")), replace(REFINER, model=Model("fourth")), "3 checkpoints"),
    "seed": (replace(BASE, seed=-1), REFINER, "node 10: the seed -1: choose 0"),
    "start": (BASE, replace(REFINER, start=-4), "node 11: start_at_step -4"),
    "steps": (replace(BASE, steps=20_000), replace(REFINER, steps=20_000), "node 10: steps 20000: choose 1 to"),
    "cfg": (replace(BASE, cfg=float("nan")), REFINER, "node 10: cfg nan: give a finite number"),
    "size": (replace(BASE, positive=(replace(BASE.positive[0], crop=(-1, 0)),)), REFINER, "node 10: the crop -1"),
}  # fmt: skip


@pytest.mark.parametrize(("base", "refiner", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_unsupported_is_named(manifest: Manifest, base: Sampling, refiner: Sampling, words: str) -> None:
    last = replace(REFINER, node="12")
    samplings = (base, refiner, last) if base.model.checkpoint == "third" else (base, refiner)
    workflow = _workflow(*samplings)
    with pytest.raises(UsageError, match=words):
        settle_pair(workflow_request(workflow, manifest), workflow, manifest, None, seed_given=False)


def test_errors_name_the_node_of_the_size_and_the_given_seed(manifest: Manifest) -> None:
    workflow = _workflow(BASE, start=Empty(1000, 512, node="5"))
    with pytest.raises(UsageError, match="node 5: the width 1000: the UNets in use take multiples of 64; try 960 or"):
        settle_pair(workflow_request(workflow, manifest), workflow, manifest, None, seed_given=False)
    negative = replace(workflow_request(WORKFLOW, manifest), seed=-1)
    with pytest.raises(UsageError, match=r"^--seed -1"):
        settle_pair(negative, WORKFLOW, manifest, None, seed_given=True)


SEVERAL: dict[str, Workflow] = {
    "three samplers": _workflow(BASE, REFINER, replace(REFINER, node="12")),
    "steps": _workflow(replace(BASE, steps=40), REFINER),
    "schedules": _workflow(replace(BASE, schedule="karras"), REFINER),
    "one checkpoint": _workflow(BASE, replace(BASE, node="11")),
    "the refiner first": _workflow(REFINER, BASE),
    "the refiner from noise": _workflow(replace(REFINER, model=Model("the_refiner"),
                                                positive=(), negative=())),
    "two pictures": Workflow((*WORKFLOW.outputs, *_workflow(BASE, vae="base").outputs)),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_samplers_without_a_common_grid_need_several_runs(manifest: Manifest, name: str) -> None:
    workflow = SEVERAL[name]
    assert pair_request(workflow, manifest, experts(workflow, manifest)) is None


def test_a_decoder_of_another_stage_needs_several_runs(manifest: Manifest) -> None:
    other = msgspec.structs.replace(_stage(), vae=msgspec.structs.replace(_stage().vae, decoder="own"))
    apart = msgspec.structs.replace(manifest, refiner=other)
    workflow = _workflow(BASE, REFINER, vae="base")
    assert pair_request(workflow, apart, check_workflow(workflow, apart)) is None
    assert pair_request(workflow, manifest, check_workflow(workflow, manifest)) is not None


def test_a_bundle_without_a_refiner_is_named(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match="node 11: needs a refiner, but the bundle has none"):
        workflow_request(WORKFLOW, msgspec.structs.replace(manifest, refiner=None))


def _named(*names: str, score: float | None = None, encoder: str = "CLIPTextEncode", start: Any = EMPTY) -> Workflow:
    return _workflow(
        *(
            replace(
                BASE,
                node=str(number),
                model=Model(name),
                positive=(Conditioning("6", "x", "x", score=score, encoder=encoder),),
                negative=(Conditioning("7", "", ""),),
            )
            for number, name in enumerate(names)
        ),
        start=start,
    )


PICTURE = Encoded(Loaded("in.png"), VaeName("base"))


@pytest.mark.parametrize(
    ("workflow", "stages"),
    [
        (_named("a"), ["base"]),
        (_named("a", "b"), ["base", "refiner"]),
        (_named("sd_xl_refiner_1.0.safetensors", "a"), ["refiner", "base"]),
        (_named("a", "sd_xl_base_1.0.safetensors"), ["refiner", "base"]),
        (_named("SDXL-Refiner", start=PICTURE), ["refiner"]),
        (_named("a", score=6.0, start=PICTURE), ["refiner"]),
        (_named("a", score=6.0), ["base"]),
        (_named("sd_xl_base", score=6.0, start=PICTURE), ["base"]),
        (_named("a", start=PICTURE), ["base"]),
    ],
)
def test_the_expert_of_a_checkpoint_is_deduced(manifest: Manifest, workflow: Workflow, stages: list[str]) -> None:
    assert list(experts(workflow, manifest).values()) == stages


def test_two_checkpoints_of_one_kind_are_refused(manifest: Manifest) -> None:
    for workflow in (
        _named("x_base", "y_base"),
        _named("a", "b", encoder="CLIPTextEncodeSDXL"),
        _named("refiner", "r/the-refiner"),
    ):
        with pytest.raises(UsageError, match="two checkpoints of one kind"):
            experts(workflow, manifest)


def test_each_side_has_its_own_layers_and_mixes(manifest: Manifest) -> None:
    zeros = Mix("zero")
    prompt = replace(BASE.positive[0], clip=replace(CLIP, last_layer=-1),
                   mixes=(Mix("average", BASE.negative[0], 0.25), zeros))  # fmt: skip
    request = workflow_request(_workflow(replace(BASE, positive=(prompt, *BASE.positive))), manifest)
    side = request.base_sides[0]
    assert (side.clip_skip, side.zeroed, side.combined[0].text) == (-1, False, "red")
    assert [(mix.kind, mix.strength) for mix in side.mixes] == [("average", 0.25), ("zero", 1.0)]
    assert side.mixes[0].other.zeroed
    resolved = resolve_request(
        replace(request, base_sides=(replace(side, clip_skip=0), request.base_sides[1])), manifest
    )
    assert [prompt.text for prompt in resolved.sides["base"][0].prompts()] == ["red", "bad", "red"]
    with pytest.raises(
        UsageError, match="node 6: its CLIP stops at layer -5, but the bundle's text encoders reach only"
    ):
        workflow_request(
            _workflow(replace(BASE, positive=(replace(prompt, clip=replace(CLIP, last_layer=-5)),))), manifest
        )


def test_another_seed_changes_the_graph_too(manifest: Manifest) -> None:
    graph = (
        '{"3": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 2}}, "4": {"class_type": "X", "inputs": {}}}'
    )
    request = with_seed(workflow_request(replace(WORKFLOW, graph=graph), manifest), 5)
    assert (request.seed, request.refiner_seed) == (5, 5)
    assert json.loads(request.graph)["3"]["inputs"] == {"seed": 5, "steps": 2}


@pytest.fixture
def picture(tmp_path: Path) -> Workflow:
    """A workflow that loads a picture in `tmp_path`, which also has a symbolic link to it."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (128, 64)).save(tmp_path / "pictures" / "in.png")
    Image.new("RGB", (128, 64)).save(tmp_path.parent / f"{tmp_path.name}-out.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pictures" / "in.png")
    np.save(tmp_path / "latents.npy", np.zeros((1, 4, 8, 16), np.float32))
    return _workflow(BASE, REFINER, start=_from("pictures/in.png"))


def _from(name: str, vae: str = "base") -> Repeated:
    return Repeated(Encoded(Loaded(name, node="5"), VaeName(vae)), 2)


def test_a_picture_is_loaded_from_the_workflows_folder(manifest: Manifest, picture: Workflow, tmp_path: Path) -> None:
    for name in ("pictures/in.png", "pictures\\in.png", "pictures/in.png [input]"):
        named = _workflow(BASE, REFINER, start=_from(name))
        request = workflow_request(named, manifest, tmp_path)
        assert isinstance(request.image, InputPicture)
        assert (request.image.size, request.count, request.strength) == ((64, 128), 2, 1.0)
        assert (request.width, request.height, request.refiner_strength) == (None, None, None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other.png", "'other.png' is not in the workflow's folder; put it into"),
        ("../OUT", "not a plain"), ("/etc/passwd", "not a plain file name"), ("link.png", "not a plain file name"),
        ("", "not a plain"), ("..\\OUT", "not a plain"), ("pictures", "is not in the workflow's folder"),
        ("a\0b", "not a plain file name"), ("x" * 5000, "not a plain"), ("latents.npy", "is not a picture"),
    ],
)  # fmt: skip
def test_no_picture_is_read_from_outside_the_folder(
    manifest: Manifest, picture: Workflow, tmp_path: Path, name: str, words: str
) -> None:
    named = _workflow(BASE, REFINER, start=_from(name.replace("OUT", f"{tmp_path.name}-out.png")))
    with pytest.raises(UsageError, match=rf"node 5 \(LoadImage\): .*{words}"):
        workflow_request(named, manifest, tmp_path)


def test_each_sampler_has_its_own_denoise(manifest: Manifest, picture: Workflow, tmp_path: Path) -> None:
    base = replace(BASE, start=0, end=TO_THE_END, leftover_noise=False, denoise=0.5)
    refiner = replace(REFINER, start=0, end=TO_THE_END, add_noise=True, denoise=0.25)
    request = workflow_request(_workflow(base, refiner, start=_from("pictures/in.png")), manifest, tmp_path)
    assert (request.strength, request.refiner_strength) == (0.5, 0.25)
    resolved = resolve_request(request, _encoding(manifest))
    assert [schedule.steps for schedule in (resolved.schedule, resolved.refiner_schedule)] == [50, 50]
    assert resolved.refiner_schedule.sigmas[0] < resolved.schedule.sigmas[0] < 14
    assert (resolved.base.start, resolved.base.stop, resolved.refiner_only) == (0, 50, False)
    assert (resolved.refiner.start, resolved.refiner.stop, resolved.refiner.add_noise) == (0, 50, True)
    # ComfyUI also samples empty latents that get less than full noise.
    empty = resolve_request(workflow_request(_workflow(base, vae="base"), manifest), manifest)
    np.testing.assert_array_equal(empty.schedule.sigmas, resolved.schedule.sigmas)


def test_a_single_sampler_with_a_score_is_the_refiner(manifest: Manifest, picture: Workflow, tmp_path: Path) -> None:
    alone = replace(REFINER, start=30, end=45, add_noise=True, leftover_noise=True)
    workflow = _workflow(alone, start=_from("pictures/in.png", "refiner"))
    resolved = resolve_request(workflow_request(workflow, manifest, tmp_path), _encoding(manifest))
    assert (resolved.refiner_only, resolved.base.steps) == (True, 0)
    assert (resolved.refiner.start, resolved.refiner.stop, resolved.refiner.leftover_noise) == (30, 45, True)
    assert (resolved.first.add_noise, resolved.refiner.add_noise) == (True, False)
    assert resolved.sides["refiner"][0].micro.aesthetic_score == 6.0
    no_refiner = msgspec.structs.replace(manifest, refiner=None)
    with pytest.raises(UsageError, match="node 11: needs a refiner"):
        workflow_request(workflow, no_refiner, tmp_path)
    other = msgspec.structs.replace(_stage(), vae=msgspec.structs.replace(_stage().vae, decoder="own"))
    apart = msgspec.structs.replace(manifest, refiner=other)
    assert workflow_request(picture, apart, tmp_path).image
    elsewhere = _workflow(BASE, REFINER, start=_from("pictures/in.png", "refiner"))
    assert pair_request(elsewhere, apart, experts(elsewhere, apart), tmp_path) is None


def _encoding(manifest: Manifest) -> Manifest:
    """Return the manifest with VAE encoders."""
    stages = {
        name: msgspec.structs.replace(stage, vae=msgspec.structs.replace(stage.vae, encoder="e"))
        for name, stage in manifest.stages().items()
    }
    return msgspec.structs.replace(manifest, **stages)


def test_a_lora_that_only_the_bundle_has_is_warned_of(manifest: Manifest, caplog: Any) -> None:
    sides = [(replace(side[0], clip=Clip("base")),) for side in (BASE.positive, BASE.negative)]
    plain = _workflow(replace(BASE, model=Model("base"), positive=sides[0], negative=sides[1]), REFINER)
    assert isinstance(workflow_request(plain, manifest), Request)
    assert "LoRA ink.safetensors at strength 0.8" in caplog.text


NUMBERS = st.integers(-(2**64), 2**64) | st.integers(-3, 60)
REALS = st.floats(-(2.0**64), 2.0**64)
PAIRS_OF_NUMBERS = st.tuples(NUMBERS, NUMBERS)


def _samplings(sampling: Sampling) -> st.SearchStrategy[Sampling]:
    prompt = st.builds(Conditioning, st.just("6"), st.text(), st.text(), st.just(sampling.positive[0].clip),
                     PAIRS_OF_NUMBERS, st.none() | PAIRS_OF_NUMBERS, st.none() | PAIRS_OF_NUMBERS, st.none() | REALS,
                     st.just(()) | st.just((Mix("zero"),)))  # fmt: skip
    return st.builds(
        replace, st.just(sampling), positive=st.just(sampling.positive) | st.tuples(prompt), seed=NUMBERS, cfg=REALS,
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
            resolve_request(workflow_request(_workflow(*samplings, start=Empty(*sizes)), manifest), manifest)


def test_pictures_of_a_table_are_looked_up_and_keep_their_names(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "0f3a", "PNG")
    table = {"cat.png": tmp_path / "0f3a", "sub/dog.png [input]": tmp_path / "0f3a"}
    assert load_image(Loaded("cat.png", "1"), table).name == "cat.png"
    assert load_image(Loaded("sub/dog.png [input]", "1"), table).name == "dog.png"
    assert load_channel(Mask("channel", file="cat.png", channel="red"), table, (64, 64))[0].shape == (8, 8)
    for strange in ("0f3a", "../cat.png", str(tmp_path / "0f3a"), "CAT.PNG", ""):
        with pytest.raises(UsageError, match="there is no picture"):
            load_image(Loaded(strange, "1"), table)
