"""Single-file checkpoints against the folders they were made from, and against diffusers' own reader."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_trt.engines.errors import SourceError
from sdxl_trt.export.checkpoints.checkpoint import TensorInfo, digest_tensors, resolve_names
from sdxl_trt.export.components import Options, plan_components
from sdxl_trt.export.graph.models import build_model
from sdxl_trt.export.sources.configs import PUBLISHED
from sdxl_trt.export.sources.single_file import SingleFile
from sdxl_trt.export.sources.source import (
    BASE_CLASS,
    REFINER_CLASS,
    PipelineSource,
    open_checkpoint_file,
    open_pipeline,
    open_vae,
    with_vae,
)
from sdxl_trt.export.sources.tokenizers import load_tokenizer, tokenizer_files
from sdxl_trt.mini.embedded import bundle_path

State = dict[str, torch.Tensor]
Files = Callable[..., Path]
CLASSES = {"base": BASE_CLASS, "refiner": REFINER_CLASS}
CLIP_G = {"base": "conditioner.embedders.1.model.", "refiner": "conditioner.embedders.0.model."}


def _never(message: str) -> None:
    pytest.fail(f"warned: {message}")


def _read(source: PipelineSource) -> dict[str, State]:
    states: dict[str, State] = {}
    for component, model in source.models.items():
        state = build_model(model.class_name, model.config, model.where).state
        checkpoint = resolve_names(model.checkpoint(), state, model.where, _never)
        read = checkpoint.read(state)
        states[component] = {name: tensor.reshape(state[name]).clone() for name, tensor in read}
    return states


def _assert_same(one: dict[str, State], other: dict[str, State]) -> None:
    assert one.keys() == other.keys()
    for component, state in one.items():
        assert state.keys() == other[component].keys()
        different = [name for name in state if not torch.equal(state[name], other[component][name])]
        assert different == [], component


@pytest.mark.parametrize("role", ["base", "refiner"])
@pytest.mark.parametrize("name", ["outline", "legacy"])
def test_every_tensor_equals_the_folders(
    made: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, role: str
) -> None:
    root, states, ldm = made(name, role)
    save_file(ldm, tmp_path / "x.safetensors")
    source = open_checkpoint_file(tmp_path / "x.safetensors", role, configs=root)  # type: ignore[arg-type]
    _assert_same(_read(source), states)
    assert [record for record in caplog.records if record.name.startswith("sdxl_trt")] == []
    folder = open_pipeline(root, CLASSES[role])
    assert source.name == "x.safetensors"
    same = {"root": folder.root, "name": folder.name, "models": folder.models}
    assert replace(source, **same) == folder  # type: ignore[arg-type]


@pytest.mark.parametrize("role", ["base", "refiner"])
def test_diffusers_converts_the_file_to_the_same_tensors(made: Any, single: Files, role: str) -> None:
    """diffusers reads the file of these tests too, with the same tensors."""
    from diffusers.loaders import single_file_utils as theirs

    root, _, _ = made("outline", role)
    path = single(role)
    ours = _read(open_checkpoint_file(path, role, configs=root))  # type: ignore[arg-type]
    stored = load_file(path)
    assert theirs.infer_diffusers_model_type(stored | _resblock_9(role)) == f"xl_{role}"
    configs = {name: json.loads((root / name / "config.json").read_bytes()) for name in ("unet", "vae")}
    converted = {
        "unet": theirs.convert_ldm_unet_checkpoint(stored, configs["unet"]),
        "vae": theirs.convert_ldm_vae_checkpoint(stored, configs["vae"]),
        "text_encoder_2": theirs.convert_open_clip_checkpoint(None, stored, prefix=CLIP_G[role]),
    }
    if role == "base":
        converted["text_encoder"] = theirs.convert_ldm_clip_checkpoint(stored)
    _assert_same(ours, converted)


@pytest.mark.parametrize(
    ("role", "class_name"), [("base", "StableDiffusionXLPipeline"), ("refiner", "StableDiffusionXLImg2ImgPipeline")]
)
def test_diffusers_loads_the_whole_file_to_the_same_tensors(
    made: Any, single: Files, role: str, class_name: str
) -> None:
    import diffusers

    root, states, _ = made("outline", role)
    path = single(role, **_resblock_9(role))
    pipeline = getattr(diffusers, class_name).from_single_file(path, config=str(root), local_files_only=True)
    loaded = {name: getattr(pipeline, name).state_dict() for name in states}
    if role == "base":
        loaded["text_encoder"] = {f"text_model.{name}": tensor for name, tensor in loaded["text_encoder"].items()}
    _assert_same(_read(open_checkpoint_file(single(role), role, configs=root)), loaded)  # type: ignore[arg-type]


def _resblock_9(role: str) -> State:
    """Return the key by which diffusers recognizes SDXL, of a layer that the small encoders lack."""
    return {f"{CLIP_G[role]}transformer.resblocks.9.mlp.c_proj.bias": torch.zeros(1)}


@pytest.mark.parametrize("role", ["base", "refiner"])
def test_its_graphs_have_the_same_weights_as_the_folders(made: Any, single: Files, role: str) -> None:
    root, _, _ = made("outline", role)
    folder, _ = plan_components(open_pipeline(root, CLASSES[role]), None, Options(), _never)
    opened = open_checkpoint_file(single(role), role, configs=root)  # type: ignore[arg-type]
    file, _ = plan_components(opened, None, Options(), _never)
    assert file.keys() == folder.keys()
    for name, plan in file.items():
        names = plan.tensor_names()
        assert plan.function() == folder[name].function()
        assert digest_tensors(plan.checkpoint, names) == digest_tensors(folder[name].checkpoint, names)


# The published size, without weights.
def _published_file(role: str, to_ldm: Any) -> tuple[SingleFile, dict[str, Any], State]:
    folders = {path.parent.name: path for path in (PUBLISHED / role).glob("*/config.json")}
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
               "text_encoder_2": "CLIPTextModelWithProjection"}  # fmt: skip
    configs = {name: json.loads(path.read_bytes()) for name, path in folders.items()}
    models = {name: build_model(classes[name], config, name) for name, config in configs.items()}
    states = {
        name: {key: torch.empty(shape, device="meta") for key, shape in model.state.items()}
        for name, model in models.items()
    }
    ldm = to_ldm(states, role, 2, 4)
    infos = {name: TensorInfo(Path("x"), name, tuple(tensor.shape), "F16") for name, tensor in ldm.items()}
    return SingleFile(Path("x"), role, infos), {name: (configs[name], models[name]) for name in models}, ldm


@pytest.mark.parametrize(
    ("role", "parameters", "tensors"),
    [("base", 2_567_463_684, {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 517}),
     ("refiner", 2_259_526_660, {"unet": 1220, "vae": 248, "text_encoder_2": 517})],
)  # fmt: skip
def test_every_tensor_of_the_published_files_is_found(
    to_ldm: Any, role: str, parameters: int, tensors: dict[str, int]
) -> None:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    file, models, ldm = _published_file(role, to_ldm)
    assert infer_diffusers_model_type(ldm) == f"xl_{role}"
    assert {name: len(model.state) for name, (_, model) in models.items()} == tensors
    assert sum(tensor.numel() for name, tensor in ldm.items() if name.startswith("model.")) == parameters
    assert ldm[f"{CLIP_G[role]}transformer.resblocks.31.attn.in_proj_weight"].shape == (3840, 1280)
    for name, (config, model) in models.items():
        found = resolve_names(file.checkpoint(name, config), model.state, name, _never)
        assert {key: info.shape for key, info in found.tensors.items()} == model.state
    assert file.unused() == []


def test_the_published_configs_are_sdxls() -> None:
    base = open_pipeline(PUBLISHED / "base", BASE_CLASS)
    refiner = open_pipeline(PUBLISHED / "refiner", REFINER_CLASS)
    assert (base.force_zeros_for_empty_prompt, base.requires_aesthetics_score) == (True, False)
    assert (refiner.force_zeros_for_empty_prompt, refiner.requires_aesthetics_score) == (False, True)
    assert base.scheduler == refiner.scheduler
    scheduler = base.scheduler
    assert (scheduler.beta_start, scheduler.beta_end, scheduler.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert (scheduler.timestep_spacing, scheduler.steps_offset, scheduler.prediction_type) == ("leading", 1, "epsilon")
    assert base.models["vae"].config == refiner.models["vae"].config
    assert base.models["vae"].config["force_upcast"] is True
    assert base.models["text_encoder_2"].config == refiner.models["text_encoder_2"].config
    assert [base.models[name].config["hidden_act"] for name in ("text_encoder", "text_encoder_2")] == [
        "quick_gelu",
        "gelu",
    ]


@pytest.mark.parametrize(
    ("name", "pad"), [("base/tokenizer", 49407), ("base/tokenizer_2", 0), ("refiner/tokenizer_2", 0)]
)
def test_the_published_tokenizers_are_clips(name: str, pad: int) -> None:
    loaded = load_tokenizer(PUBLISHED / name)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (49406, 49407, pad)
    assert loaded.json == (bundle_path() / Path(name).name / "tokenizer.json").read_bytes(), (
        "the embedded pair also has CLIP's"
    )


def test_a_published_tokenizer_written_elsewhere_is_complete(tmp_path: Path) -> None:
    import transformers

    for name, content in tokenizer_files(PUBLISHED / "base" / "tokenizer").items():
        (tmp_path / name).write_bytes(content)
    ids = transformers.CLIPTokenizer.from_pretrained(tmp_path)("a photo of a cat").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407], "the ids of OpenAI's tokenizer"


def test_a_folder_without_vocabulary_is_not_completed(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes((PUBLISHED / "base/tokenizer/tokenizer_config.json").read_bytes())
    with pytest.raises(SourceError, match=r"neither tokenizer\.json nor vocab\.json"):
        load_tokenizer(tmp_path)
    assert list(tokenizer_files(tmp_path)) == ["tokenizer_config.json"]


EXTRAS = ("conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
          "conditioner.embedders.0.transformer.text_projection.weight", "conditioner.embedders.0.logit_scale",
          "conditioner.embedders.1.model.logit_scale", "model_ema.decay", "model_ema.diffusion_modelout2bias",
          "denoiser.sigmas", "alphas_cumprod", "first_stage_model.loss.logvar",
          "first_stage_model.model_ema.num_updates")  # fmt: skip


def test_known_extras_cause_no_warning(made: Any, single: Files, caplog: pytest.LogCaptureFixture) -> None:
    root, states, _ = made("outline", "base")
    source = open_checkpoint_file(single(**dict.fromkeys(EXTRAS, torch.zeros(1))), "base", configs=root)
    _assert_same(_read(source), states)
    assert [record for record in caplog.records if record.name.startswith("sdxl_trt")] == []


def test_a_checkpoint_without_its_autoencoder_needs_another(made: Any, single: Files) -> None:
    root, states, _ = made("outline", "base")
    source = open_checkpoint_file(single(without="first_stage_model"), "base", configs=root)
    with pytest.raises(SourceError, match=r"holds no vae .*; give one with --vae"):
        plan_components(source, None, Options(), _never)
    _assert_same(_read(with_vae(source, open_vae(root))), states)


# Autoencoders alone.
@pytest.mark.parametrize("layout", ["ldm", "ldm with prefix", "diffusers", "checkpoint", "refiner"])
def test_an_autoencoder_is_read_in_every_layout(made: Any, tmp_path: Path, layout: str) -> None:
    role = "refiner" if layout == "refiner" else "base"
    root, states, ldm = made("outline", role)
    inner = {name: tensor for name, tensor in ldm.items() if name.startswith("first_stage_model.")}
    files = {
        "ldm": {name.removeprefix("first_stage_model."): tensor for name, tensor in inner.items()},
        "ldm with prefix": inner, "diffusers": states["vae"], "checkpoint": ldm, "refiner": ldm,
    }  # fmt: skip
    save_file(files[layout], tmp_path / "vae.safetensors")
    vae = open_vae(tmp_path / "vae.safetensors", configs=root / "vae")
    source = with_vae(open_pipeline(root, CLASSES[role]), vae)
    _assert_same(_read(source), states)
    assert source.models["vae"].name == "vae.safetensors"
