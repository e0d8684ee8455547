"""Single-file checkpoints of another kind, damaged, or with extra tensors: the error or warning for each."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdxl_trt.engines.errors import CorruptError, SourceError
from sdxl_trt.export.components import Options, plan_components
from sdxl_trt.export.sources.configs import PUBLISHED
from sdxl_trt.export.sources.single_file import open_single_file
from sdxl_trt.export.sources.source import BASE_CLASS, REFINER_CLASS, open_checkpoint_file, open_source, open_vae

State = dict[str, torch.Tensor]
Files = Callable[..., Path]
CLASSES = {"base": BASE_CLASS, "refiner": REFINER_CLASS}
CLIP_G = {"base": "conditioner.embedders.1.model.", "refiner": "conditioner.embedders.0.model."}


def _save(tensors: State, path: Path) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)


def _never(message: str) -> None:
    pytest.fail(f"warned: {message}")


# Kinds of files.
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
    ("nothing", {"weights": A}, "not an SDXL checkpoint"),
    ("empty", {}, "not an SDXL checkpoint"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "what"), [kind[1:] for kind in KINDS], ids=[kind[0] for kind in KINDS])
@pytest.mark.parametrize("role", ["base", "refiner"])
def test_another_kind_of_file_is_named_in_the_error(tmp_path: Path, role: str, tensors: State, what: str) -> None:
    _save(tensors, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=rf"^--{role} .*x\.safetensors: is {what}.*; --{role} takes an SDXL {role}"):
        open_single_file(tmp_path / "x.safetensors", role)  # type: ignore[arg-type]


@pytest.mark.parametrize(("given_role", "asked"), [("base", "refiner"), ("refiner", "base")])
def test_the_errors_for_swapped_files_name_the_right_options(single: Files, given_role: str, asked: str) -> None:
    with pytest.raises(SourceError, match=f"--{asked} .* is an SDXL {given_role} .*which goes to --{given_role}; "):
        open_source(single(given_role), asked)  # type: ignore[arg-type]


def test_a_schedule_of_another_kind_is_refused(single: Files) -> None:
    with pytest.raises(SourceError, match="fine-tune on EDM's schedule, which is not supported"):
        open_source(single(edm_mean=A), "base")


def test_an_edit_model_and_a_refiner_that_inpaints_are_refused(single: Files) -> None:
    for role, channels, what in (("base", 8, "an edit model"), ("refiner", 9, "an inpainting model")):
        _refuse_channels(single, role, channels, what)


def _refuse_channels(single: Files, role: str, channels: int, what: str) -> None:
    path = single(role, **{"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, channels, 3, 3)})
    with pytest.raises(SourceError, match=rf"is {what} \(its UNet takes {channels} channels\), .*text-to-image"):
        open_source(path, role)  # type: ignore[arg-type]


def test_a_base_that_inpaints_keeps_its_nine_channels(single: Files) -> None:
    path = single(**{"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)})
    assert open_source(path, "base").models["unet"].config["in_channels"] == 9


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".pkl"])
@pytest.mark.parametrize("exists", [True, False])
def test_pickled_files_are_refused_unread(tmp_path: Path, suffix: str, exists: bool) -> None:
    path = tmp_path / f"model{suffix}"
    if exists:
        path.write_bytes(b"\x80\x02}q\x00.")
    for call in (lambda: open_source(path, "base"), lambda: open_vae(path)):
        with pytest.raises(SourceError, match="is pickled, which can run code when loaded; get the model as"):
            call()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for call in (lambda: open_source(tmp_path / "x.safetensors", "base"), lambda: open_vae(tmp_path / "x.safetensors")):
        with pytest.raises(SourceError, match=r"x\.safetensors: no such file"):
            call()


# Stated schedules, and extra tensors.
def test_the_published_config_is_the_default(single: Files, caplog: pytest.LogCaptureFixture) -> None:
    source = open_source(str(single()), "base")
    assert "a UNet of its own outline, read from its tensors" in caplog.text
    assert source.models["unet"].config["cross_attention_dim"] == 2048
    assert source.models["unet"].where.endswith("base.safetensors/unet")
    assert source.models["unet"].where.endswith("/unet")
    assert source.tokenizers == {name: PUBLISHED / "base" / name for name in ("tokenizer", "tokenizer_2")}
    with pytest.raises(CorruptError, match=r"base\.safetensors/text_encoder: tensor .* shape .* config expects"):
        plan_components(source, None, Options(), _never)


def test_v_prediction_is_read_from_the_file(made: Any, single: Files, caplog: pytest.LogCaptureFixture) -> None:
    source = open_checkpoint_file(single(v_pred=torch.empty(0)), "base", configs=made("outline", "base")[0])
    assert source.scheduler.prediction_type == source.scheduler_config["prediction_type"] == "v_prediction"
    assert [record for record in caplog.records if record.name.startswith("sdxl_trt")] == []


def test_a_zero_terminal_snr_is_read_from_the_file(made: Any, single: Files, caplog: pytest.LogCaptureFixture) -> None:
    path = single(v_pred=torch.empty(0), ztsnr=torch.empty(0))
    source = open_checkpoint_file(path, "base", configs=made("outline", "base")[0])
    assert source.scheduler_config["rescale_betas_zero_snr"] is True
    assert source.scheduler.rescale_betas_zero_snr
    assert [record for record in caplog.records if record.name.startswith("sdxl_trt")] == []


@pytest.mark.parametrize("key", ["surprise", "conditioner.embedders.2.model.x", "first_stage_modelx.y"])
def test_unknown_extras_outside_the_components_cause_a_warning(
    single: Files, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    open_source(single(**{key: A, "zz.last": A}), "base")
    assert re.search(rf"ignored 2 tensors that belong to no component, for example {key}", caplog.text)


@pytest.mark.parametrize(
    ("component", "key"),
    [("unet", "model.diffusion_model.input_blocks.77.0.op.weight"), ("vae", "first_stage_model.decoder.extra.weight"),
     ("text_encoder_2", "conditioner.embedders.1.model.visual.proj")],
)  # fmt: skip
def test_unknown_extras_in_a_component_cause_a_warning(made: Any, single: Files, component: str, key: str) -> None:
    warned: list[str] = []
    source = open_checkpoint_file(single(**{key: A}), "base", configs=made("outline", "base")[0])
    plan_components(source, None, Options(), warned.append)
    assert len(warned) == 1
    assert f"base.safetensors/{component}: ignored 1 tensors that the model does not use" in warned[0]


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


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_corrupt(single: Files, keep: int) -> None:
    path = single()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptError, match=r"base\.safetensors: broken safetensors"):
        open_source(path, "base")


def test_a_file_that_is_not_an_autoencoder_is_named_in_the_error(tmp_path: Path) -> None:
    _save({"cond_stage_model.x": A, "first_stage_model.decoder.conv_in.weight": A}, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=r"--vae .*is a Stable Diffusion 1 checkpoint.*--vae takes an SDXL auto"):
        open_vae(tmp_path / "x.safetensors")


def test_two_names_of_one_tensor_are_corrupt(made: Any, single: Files) -> None:
    """An LDM name and diffusers' name for the same tensor: which one counts is unknown."""
    extra = {"model.diffusion_model.conv_in.weight": torch.ones(16, 4, 3, 3)}
    source = open_checkpoint_file(single(**extra), "base", configs=made("outline", "base")[0])
    with pytest.raises(CorruptError, match=r"(conv_in|input_blocks\.0\.0)\.weight are the same tensor"):
        source.models["unet"].checkpoint()


def test_a_scale_of_a_weight_that_is_not_fp8_is_refused(made: Any, single: Files) -> None:
    source = open_checkpoint_file(
        single(**{"model.diffusion_model.out.2.scale_weight": A}), "base", configs=made("outline", "base")[0]
    )
    with pytest.raises(SourceError, match=r"conv_out\.scale_weight scales conv_out\.weight, which is stored as F32"):
        plan_components(source, None, Options(), _never)


def test_a_file_marked_as_scaled_without_scales_is_refused(single: Files) -> None:
    with pytest.raises(SourceError, match=r"states that its fp8 weights are scaled .*, but has no scales"):
        open_source(single(scaled_fp8=A), "base")
