"""Single-file checkpoints against the folders they were made of, and against diffusers' own reading of them."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_trt.engines.errors import CorruptError, SourceError
from sdxl_trt.export.components import Options, plan_components
from sdxl_trt.export.configs import PUBLISHED
from sdxl_trt.export.models import build_model
from sdxl_trt.export.single_file import SingleFile, open_single_file
from sdxl_trt.export.sources import (
    BASE_CLASS,
    REFINER_CLASS,
    PipelineSource,
    open_checkpoint_file,
    open_pipeline,
    open_source,
    open_vae,
    with_vae,
)
from sdxl_trt.export.tensors import TensorInfo, digest_tensors, resolve_names
from sdxl_trt.export.tokenizers import load_tokenizer, tokenizer_files
from sdxl_trt.mini.embedded import bundle_path

State = dict[str, torch.Tensor]
Files = Callable[..., Path]
CLASSES = {"base": BASE_CLASS, "refiner": REFINER_CLASS}
CLIP_G = {"base": "conditioner.embedders.1.model.", "refiner": "conditioner.embedders.0.model."}


# The way back, as the authors of SDXL numbered their modules: written for these tests, apart from export/ldm.py.
def _unet_name(name: str, state: Mapping[str, Any], layers: int) -> str:
    def block(match: re.Match[str]) -> str:
        half, level, part, number = match[1], int(match[2]), match[3], int(match[4])
        first = (layers + 1) * level
        if half == "up":
            if part == "upsamplers":
                attends = any(key.startswith(f"up_blocks.{level}.attentions.") for key in state)
                return f"output_blocks.{first + layers}.{1 + attends}.conv."
            return f"output_blocks.{first + number}.{int(part == 'attentions')}."
        if part == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op."
        return f"input_blocks.{first + number + 1}.{int(part == 'attentions')}."

    name = re.sub(
        r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(conv\.)?", block, name
    )
    name = re.sub(r"^mid_block\.resnets\.(\d)\.", lambda match: f"middle_block.{2 * int(match[1])}.", name)
    name = name.replace("mid_block.attentions.0.", "middle_block.1.")
    if re.match(r"(input_blocks|output_blocks)\.\d+\.0\.|middle_block\.[02]\.", name):
        for ours, theirs in (
            ("time_emb_proj.", "emb_layers.1."), ("conv_shortcut.", "skip_connection."), ("norm1.", "in_layers.0."),
            ("conv1.", "in_layers.2."), ("norm2.", "out_layers.0."), ("conv2.", "out_layers.3."),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
    for ours, theirs in (
        ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"),
        ("conv_norm_out.", "out.0."), ("conv_out.", "out.2."),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return "input_blocks.0.0." + name.removeprefix("conv_in.") if name.startswith("conv_in.") else name


def _vae_name(name: str, levels: int) -> str:
    name = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2", name)
    name = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
    name = re.sub(r"decoder\.up_blocks\.(\d)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", name)
    name = re.sub(r"(up\.\d)\.resnets\.(\d)", r"\1.block.\2", name).replace("upsamplers.0", "upsample")
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    name = re.sub(r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1", name)
    name = name.replace("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out")
    name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def _open_clip(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in state.items():
        if name == "text_projection.weight":
            yield "text_projection", tensor.T.contiguous()
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        else:
            fused = name.replace(".q_proj.weight", ".in_proj_weight").replace(".q_proj.bias", ".in_proj_bias")
            parts = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"] if fused != name else [tensor]
            for ours, theirs in (
                ("text_model.encoder.layers.", "transformer.resblocks."), (".self_attn.", ".attn."),
                (".layer_norm1.", ".ln_1."), (".layer_norm2.", ".ln_2."), (".fc1.", ".c_fc."), (".fc2.", ".c_proj."),
                ("text_model.final_layer_norm.", "ln_final."), ("text_model.embeddings.token_e", "token_e"),
                ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
            ):  # fmt: skip
                fused = fused.replace(ours, theirs)
            yield fused, torch.cat(parts)


def _states(root: Path) -> dict[str, State]:
    """Return a folder's tensors by component, under published names, as diffusers and transformers load them."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    states = {
        "unet": UNet2DConditionModel.from_pretrained(root / "unet").state_dict(),
        "vae": AutoencoderKL.from_pretrained(root / "vae").state_dict(),
        "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(root / "text_encoder_2").state_dict(),
    }
    if (root / "text_encoder").is_dir():
        bare = CLIPTextModel.from_pretrained(root / "text_encoder").state_dict()
        states["text_encoder"] = {f"text_model.{name.removeprefix('text_model.')}": bare[name] for name in bare}
    return states


def _to_ldm(states: dict[str, State], role: str, layers: int, levels: int) -> State:
    """Return one checkpoint with LDM names of a pipeline's states."""
    unet = {f"model.diffusion_model.{_unet_name(k, states['unet'], layers)}": v for k, v in states["unet"].items()}
    vae = {f"first_stage_model.{_vae_name(k, levels)}": v for k, v in states["vae"].items()}
    for name, tensor in vae.items():
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            vae[name] = tensor[:, :, None, None]
    clip = {f"conditioner.embedders.0.transformer.{k}": v for k, v in states.get("text_encoder", {}).items()}
    open_clip = {CLIP_G[role] + name: tensor for name, tensor in _open_clip(states["text_encoder_2"])}
    whole = unet | vae | clip | open_clip
    assert len(whole) == len(unet) + len(vae) + len(clip) + len(open_clip)
    return {name: tensor.contiguous() for name, tensor in whole.items()}


@pytest.fixture(scope="session")
def made(pairs: Callable[[str], Any]) -> Callable[[str, str], tuple[Path, dict[str, State], State]]:
    """Return a function from a pair's name and a role to its folder, its states and its LDM checkpoint."""
    known: dict[tuple[str, str], tuple[Path, dict[str, State], State]] = {}

    def get(name: str, role: str) -> tuple[Path, dict[str, State], State]:
        if (name, role) not in known:
            root: Path = getattr(pairs(name), role)
            states = _states(root)
            levels = len(json.loads((root / "vae" / "config.json").read_bytes())["block_out_channels"])
            known[name, role] = (root, states, _to_ldm(states, role, 1, levels))
        return known[name, role]

    return get


@pytest.fixture
def single(made: Any, tmp_path: Path) -> Files:
    """Return a function that writes the outline pair's `role` as a single file, with changes to its tensors."""

    def write(role: str = "base", without: str = "", **changes: torch.Tensor) -> Path:
        _, _, ldm = made("outline", role)
        kept = {name: tensor for name, tensor in ldm.items() if not without or not re.match(without, name)}
        _save(kept | changes, tmp_path / f"{role}.safetensors")
        return tmp_path / f"{role}.safetensors"

    return write


def _save(tensors: State, path: Path) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)


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
def test_every_tensor_is_that_of_the_folder(
    made: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, role: str
) -> None:
    root, states, ldm = made(name, role)
    _save(ldm, tmp_path / "x.safetensors")
    source = open_checkpoint_file(tmp_path / "x.safetensors", role, configs=root)  # type: ignore[arg-type]
    _assert_same(_read(source), states)
    assert [record for record in caplog.records if record.name.startswith("sdxl_trt")] == []
    folder = open_pipeline(root, CLASSES[role])
    assert source.name == "x.safetensors"
    same = {"root": folder.root, "name": folder.name, "models": folder.models}
    assert replace(source, **same) == folder  # type: ignore[arg-type]


@pytest.mark.parametrize("role", ["base", "refiner"])
def test_diffusers_converts_the_file_to_the_same_tensors(made: Any, single: Files, role: str) -> None:
    """The file of these tests is one that others read, and they read the same from it."""
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
    """Return the key by which diffusers knows SDXL: of a layer that the small encoders have not."""
    return {f"{CLIP_G[role]}transformer.resblocks.9.mlp.c_proj.bias": torch.zeros(1)}


@pytest.mark.parametrize("role", ["base", "refiner"])
def test_its_graphs_take_the_same_weights_as_the_folders(made: Any, single: Files, role: str) -> None:
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
def _published_file(role: str) -> tuple[SingleFile, dict[str, Any], State]:
    folders = {path.parent.name: path for path in (PUBLISHED / role).glob("*/config.json")}
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
               "text_encoder_2": "CLIPTextModelWithProjection"}  # fmt: skip
    configs = {name: json.loads(path.read_bytes()) for name, path in folders.items()}
    models = {name: build_model(classes[name], config, name) for name, config in configs.items()}
    states = {
        name: {key: torch.empty(shape, device="meta") for key, shape in model.state.items()}
        for name, model in models.items()
    }
    ldm = _to_ldm(states, role, 2, 4)
    infos = {name: TensorInfo(Path("x"), name, tuple(tensor.shape), "F16") for name, tensor in ldm.items()}
    return SingleFile(Path("x"), role, infos), {name: (configs[name], models[name]) for name in models}, ldm


@pytest.mark.parametrize(
    ("role", "parameters", "tensors"),
    [("base", 2_567_463_684, {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 517}),
     ("refiner", 2_259_526_660, {"unet": 1220, "vae": 248, "text_encoder_2": 517})],
)  # fmt: skip
def test_every_tensor_of_the_published_files_is_found(role: str, parameters: int, tensors: dict[str, int]) -> None:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    file, models, ldm = _published_file(role)
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
        "the embedded pair has CLIP's too"
    )


def test_a_published_tokenizer_written_elsewhere_is_whole(tmp_path: Path) -> None:
    import transformers

    for name, content in tokenizer_files(PUBLISHED / "base" / "tokenizer").items():
        (tmp_path / name).write_bytes(content)
    ids = transformers.CLIPTokenizer.from_pretrained(tmp_path)("a photo of a cat").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407], "the ids that OpenAI's tokenizer gives"


def test_a_folder_without_vocabulary_is_not_completed(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes((PUBLISHED / "base/tokenizer/tokenizer_config.json").read_bytes())
    with pytest.raises(SourceError, match=r"neither tokenizer\.json nor vocab\.json"):
        load_tokenizer(tmp_path)
    assert list(tokenizer_files(tmp_path)) == ["tokenizer_config.json"]


# What a file is.
A, B = torch.zeros(1), torch.zeros(4, 4, 3, 3)
KINDS: list[tuple[str, State, str]] = [
    ("sd1", {"model.diffusion_model.input_blocks.0.0.weight": B,
             "cond_stage_model.transformer.text_model.final_layer_norm.bias": A}, "a Stable Diffusion 1 checkpoint"),
    ("sd2", {"model.diffusion_model.input_blocks.0.0.weight": B, "cond_stage_model.model.ln_final.bias": A},
     "a Stable Diffusion 2 checkpoint"),
    ("kohya LoRA", {"lora_unet_down_blocks_1_attentions_0_proj_in.lora_up.weight": A}, "a LoRA, which goes to --lora"),
    ("diffusers LoRA", {"unet.down_blocks.1.attentions.0.proj_in.lora_A.weight": A}, "a LoRA, which goes to --lora"),
    ("older LoRA", {"unet.mid_block.attentions.0.processor.to_q_lora.up.weight": A}, "a LoRA, which goes to --lora"),
    ("LoHa", {"lora_unet_x.hada_w1_a": A}, "a LoRA, which goes to --lora"),
    ("VAE", {"decoder.conv_in.weight": A, "encoder.conv_in.weight": A}, "an autoencoder, which goes to --vae"),
    ("VAE in LDM", {"first_stage_model.decoder.conv_in.weight": A}, "an autoencoder, which goes to --vae"),
    ("lone UNet", {"model.diffusion_model.input_blocks.0.0.weight": B}, "a UNet without its encoders"),
    ("diffusers UNet", {"down_blocks.0.resnets.0.conv1.weight": B}, "a UNet without its encoders"),
    ("encoders", {"conditioner.embedders.1.model.ln_final.bias": A}, "a pair of text encoders without a UNet"),
    ("encoder", {"text_model.final_layer_norm.bias": A}, "a text encoder"),
    ("ControlNet", {"control_model.input_blocks.0.0.weight": B}, "a ControlNet"),
    ("diffusers ControlNet", {"controlnet_cond_embedding.conv_in.bias": A, "down_blocks.0.resnets.0.conv1.bias": A},
     "a ControlNet"),
    ("Flux", {"double_blocks.0.img_attn.norm.key_norm.scale": A}, "a diffusion transformer"),
    ("SD3", {"model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": A},
     "a diffusion transformer"),
    ("embedding", {"clip_g": A, "clip_l": A}, "a textual inversion embedding"),
    ("nothing", {"weights": A}, "no SDXL checkpoint"),
    ("empty", {}, "no SDXL checkpoint"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "what"), [kind[1:] for kind in KINDS], ids=[kind[0] for kind in KINDS])
@pytest.mark.parametrize("role", ["base", "refiner"])
def test_another_kind_of_file_is_called_by_its_name(tmp_path: Path, role: str, tensors: State, what: str) -> None:
    _save(tensors, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=rf"^--{role} .*x\.safetensors: is {what}.*; --{role} takes an SDXL {role}"):
        open_single_file(tmp_path / "x.safetensors", role)  # type: ignore[arg-type]


@pytest.mark.parametrize(("given_role", "asked"), [("base", "refiner"), ("refiner", "base")])
def test_swapped_files_say_where_each_goes(single: Files, given_role: str, asked: str) -> None:
    with pytest.raises(SourceError, match=f"--{asked} .* is an SDXL {given_role} .*which goes to --{given_role}; "):
        open_source(single(given_role), asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["scaled_fp8", "model.diffusion_model.out.2.scale_weight"])
def test_scaled_fp8_is_refused(single: Files, key: str) -> None:
    """Its weights mean nothing without their scales."""
    with pytest.raises(SourceError, match="is a quantized checkpoint, which is not supported"):
        open_source(single(**{key: A}), "base")


def test_a_schedule_of_another_kind_is_refused(single: Files) -> None:
    with pytest.raises(SourceError, match="fine-tune on EDM's schedule, which is not supported"):
        open_source(single(edm_mean=A), "base")


@pytest.mark.parametrize(("channels", "what"), [(9, "an inpainting model"), (8, "an edit model")])
def test_a_unet_that_takes_more_than_latents_is_refused(single: Files, channels: int, what: str) -> None:
    path = single(**{"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, channels, 3, 3)})
    with pytest.raises(SourceError, match=rf"is {what} \(its UNet takes {channels} channels\), .*text-to-image"):
        open_source(path, "base")


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".pkl"])
@pytest.mark.parametrize("exists", [True, False])
def test_pickled_files_are_refused_unread(tmp_path: Path, suffix: str, exists: bool) -> None:
    path = tmp_path / f"model{suffix}"
    if exists:
        path.write_bytes(b"\x80\x02}q\x00.")
    for call in (lambda: open_source(path, "base"), lambda: open_vae(path)):
        with pytest.raises(SourceError, match=r"is pickled, which can run code when loaded; get the \.safetensors"):
            call()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for call in (lambda: open_source(tmp_path / "x.safetensors", "base"), lambda: open_vae(tmp_path / "x.safetensors")):
        with pytest.raises(SourceError, match=r"x\.safetensors: no such file"):
            call()


# What it says of itself.
def test_the_published_config_is_the_default(single: Files) -> None:
    source = open_source(str(single()), "base")
    assert source.models["unet"].config["cross_attention_dim"] == 2048
    assert source.models["unet"].where.endswith("base.safetensors/unet")
    assert source.models["unet"].where.endswith("/unet")
    assert source.tokenizers == {name: PUBLISHED / "base" / name for name in ("tokenizer", "tokenizer_2")}
    with pytest.raises(CorruptError, match=r"base\.safetensors/text_encoder: tensor .* shape .* config asks for"):
        plan_components(source, None, Options(), _never)


def test_v_prediction_is_read_from_the_file(single: Files, caplog: pytest.LogCaptureFixture) -> None:
    source = open_source(single(v_pred=torch.empty(0)), "base")
    assert source.scheduler.prediction_type == source.scheduler_config["prediction_type"] == "v_prediction"
    assert [record for record in caplog.records if record.name.startswith("sdxl_trt")] == []


def test_a_zero_terminal_snr_is_read_from_the_file(single: Files, caplog: pytest.LogCaptureFixture) -> None:
    source = open_source(single(v_pred=torch.empty(0), ztsnr=torch.empty(0)), "base")
    assert source.scheduler_config["rescale_betas_zero_snr"] is True
    followed = getattr(source.scheduler, "rescale_betas_zero_snr", False)
    assert followed or "rescale_betas_zero_snr is not followed" in caplog.text


EXTRAS = ("conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
          "conditioner.embedders.0.transformer.text_projection.weight", "conditioner.embedders.0.logit_scale",
          "conditioner.embedders.1.model.logit_scale", "model_ema.decay", "model_ema.diffusion_modelout2bias",
          "denoiser.sigmas", "alphas_cumprod", "first_stage_model.loss.logvar",
          "first_stage_model.model_ema.num_updates")  # fmt: skip


def test_known_extras_are_silent(made: Any, single: Files, caplog: pytest.LogCaptureFixture) -> None:
    root, states, _ = made("outline", "base")
    source = open_checkpoint_file(single(**dict.fromkeys(EXTRAS, A)), "base", configs=root)
    _assert_same(_read(source), states)
    assert [record for record in caplog.records if record.name.startswith("sdxl_trt")] == []


@pytest.mark.parametrize("key", ["surprise", "conditioner.embedders.2.model.x", "first_stage_modelx.y"])
def test_unknown_extras_beside_the_parts_are_warned_of(
    single: Files, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    open_source(single(**{key: A, "zz.last": A}), "base")
    assert re.search(rf"2 tensors of no part of the model were left out, {key} for one", caplog.text)


@pytest.mark.parametrize(
    ("component", "key"),
    [("unet", "model.diffusion_model.input_blocks.77.0.op.weight"), ("vae", "first_stage_model.decoder.extra.weight"),
     ("text_encoder_2", "conditioner.embedders.1.model.visual.proj")],
)  # fmt: skip
def test_unknown_extras_in_a_part_are_warned_of_with_it(made: Any, single: Files, component: str, key: str) -> None:
    heard: list[str] = []
    source = open_checkpoint_file(single(**{key: A}), "base", configs=made("outline", "base")[0])
    plan_components(source, None, Options(), heard.append)
    assert len(heard) == 1
    assert f"base.safetensors/{component}: 1 tensors that the model does not use" in heard[0]


# Damage.
@pytest.mark.parametrize(
    ("key", "missing"),
    [("model.diffusion_model.out.2.bias", "conv_out.bias"),
     ("conditioner.embedders.1.model.text_projection", "text_projection.weight"),
     ("conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias", "layers.1.self_attn.k_proj.bias"),
     ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "text_model.final_layer_norm.bias"),
     ("first_stage_model.post_quant_conv.weight", "post_quant_conv.weight")],
)  # fmt: skip
def test_a_missing_tensor_is_named(made: Any, single: Files, key: str, missing: str) -> None:
    source = open_checkpoint_file(single(without=re.escape(key)), "base", configs=made("outline", "base")[0])
    with pytest.raises(CorruptError, match=rf"tensor .*{re.escape(missing)} is missing"):
        plan_components(source, None, Options(), _never)


def test_a_misshapen_fused_projection_is_corrupt(made: Any, single: Files) -> None:
    key = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    source = open_checkpoint_file(single(**{key: torch.zeros(143, 48)}), "base", configs=made("outline", "base")[0])
    with pytest.raises(CorruptError, match=r"self_attn\.k_proj\.weight has shape \[47, 48\].*\[48, 48\]"):
        plan_components(source, None, Options(), _never)


def test_a_checkpoint_without_its_autoencoder_says_so_unless_it_gets_another(made: Any, single: Files) -> None:
    root, states, _ = made("outline", "base")
    source = open_checkpoint_file(single(without="first_stage_model"), "base", configs=root)
    with pytest.raises(SourceError, match=r"holds no vae .*; give one with --vae"):
        plan_components(source, None, Options(), _never)
    _assert_same(_read(with_vae(source, open_vae(root))), states)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_corrupt(single: Files, keep: int) -> None:
    path = single()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptError, match=r"base\.safetensors: broken safetensors"):
        open_source(path, "base")


# Autoencoders alone.
@pytest.mark.parametrize("layout", ["ldm", "ldm with prefix", "diffusers", "checkpoint", "refiner"])
def test_an_autoencoder_comes_in_every_layout(made: Any, tmp_path: Path, layout: str) -> None:
    role = "refiner" if layout == "refiner" else "base"
    root, states, ldm = made("outline", role)
    inner = {name: tensor for name, tensor in ldm.items() if name.startswith("first_stage_model.")}
    files = {
        "ldm": {name.removeprefix("first_stage_model."): tensor for name, tensor in inner.items()},
        "ldm with prefix": inner, "diffusers": states["vae"], "checkpoint": ldm, "refiner": ldm,
    }  # fmt: skip
    _save(files[layout], tmp_path / "vae.safetensors")
    vae = open_vae(tmp_path / "vae.safetensors", configs=root / "vae")
    source = with_vae(open_pipeline(root, CLASSES[role]), vae)
    _assert_same(_read(source), states)
    assert source.models["vae"].name == "vae.safetensors"


def test_what_is_no_autoencoder_is_called_by_its_name(tmp_path: Path) -> None:
    _save({"cond_stage_model.x": A, "first_stage_model.decoder.conv_in.weight": A}, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=r"--vae .*is a Stable Diffusion 1 checkpoint.*--vae takes an SDXL auto"):
        open_vae(tmp_path / "x.safetensors")
