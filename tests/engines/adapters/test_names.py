"""Names of LoRA files against diffusers' own converters, over every module of SDXL base."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)

from sdxl_trt.engines.adapters.names import LoraComponent, foreign_format, module_spellings, place_module, split_key
from sdxl_trt.engines.adapters.unet_names import unet_prefixes
from sdxl_trt.export.graph.models import MetaModel, build_model

# The published outline of SDXL base, the only one that diffusers' converter supports.
UNET = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "in_channels": 4,
    "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}  # fmt: skip
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3}
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")


@pytest.fixture(scope="module")
def unet() -> MetaModel:
    return build_model("UNet2DConditionModel", UNET, "unet")


@pytest.fixture(scope="module")
def text() -> MetaModel:
    return build_model("CLIPTextModelWithProjection", TEXT, "text_encoder_2")


def _modules(model: MetaModel) -> list[str]:
    return [n.removesuffix(".weight") for n, s in model.state.items() if n.endswith(".weight") and len(s) in (2, 4)]


def _ours(keys: Iterable[str], model: MetaModel) -> dict[str, str]:
    """Return {key: "component.module"}, from the key to the published name."""
    kind: LoraComponent = "unet" if "in_channels" in model.config else "text_encoder"
    spellings = module_spellings(kind, model.state, model.config)
    found = {}
    for key in keys:
        split = split_key(key)
        assert split is not None, key
        place = place_module(split[0])
        assert place is not None, key
        found[key] = f"{place.component}.{spellings[place.module]}"
    return found


def _tagged(keys: list[str]) -> dict[str, torch.Tensor]:
    return {key: torch.full((1, 1), float(i)) for i, key in enumerate(keys)}


def _diffusers(keys: list[str]) -> dict[str, str]:
    """Return {key: "component.module"} as diffusers converts kohya's keys."""
    # It requires both halves of a branch; only the down halves are compared below.
    given = _tagged(keys)
    twins = {key.replace("lora_down", "lora_up"): torch.zeros(1, 1) for key in keys}
    state, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        {**given, **twins}, unet_config=SimpleNamespace(layers_per_block=2)
    )
    tags = {float(tensor): key for key, tensor in given.items()}
    converted = convert_unet_state_dict_to_peft({k: v for k, v in state.items() if k.startswith("unet.")})
    encoders = {k: v for k, v in state.items() if not k.startswith("unet.")}
    if encoders:
        converted |= convert_state_dict_to_peft(convert_state_dict_to_diffusers(encoders))
    down = {name: tensor for name, tensor in converted.items() if name.endswith(".lora_A.weight")}
    return {tags[float(tensor)]: name.removesuffix(".lora_A.weight") for name, tensor in down.items()}


def _agree(keys: list[str], model: MetaModel) -> None:
    theirs = _diffusers(keys)
    assert len(theirs) == len(keys)
    assert _ours(keys, model) == theirs


def test_kohya_names_of_ldm_modules_match_diffusers(unet: MetaModel) -> None:
    inverse = {module: ldm for ldm, module in unet_prefixes(unet.config).items()}
    keys = [f"lora_unet_{inverse[module].replace('.', '_')}.lora_down.weight" for module in _modules(unet)]
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.lora_down.weight" in keys
    assert len(keys) > 700
    _agree(keys, unet)


def test_kohya_names_of_diffusers_modules_match_diffusers(unet: MetaModel) -> None:
    # diffusers mistakes these two for LDM names and drops them; they are as valid as the others.
    lost = [module for module in _modules(unet) if module.startswith("add_embedding.")]
    keys = [f"lora_unet_{m.replace('.', '_')}.lora_down.weight" for m in _modules(unet) if m not in lost]
    _agree(keys, unet)
    ours = _ours([f"lora_unet_{m.replace('.', '_')}.lora_down.weight" for m in lost], unet)
    assert list(ours.values()) == [f"unet.{m}" for m in lost]


def test_kohya_names_of_encoders_match_diffusers(text: MetaModel) -> None:
    modules = [module for module in _modules(text) if ".layers." in module]
    names = [module.replace(".", "_") for module in modules]
    keys = [f"lora_{prefix}_{name}.lora_down.weight" for prefix in ("te1", "te2") for name in names]
    _agree(keys, text)
    _agree([f"lora_te_{name}.lora_down.weight" for name in names], text)


def _processor_key(module: str) -> str:
    parent, _, leaf = module.replace(".to_out.0", ".to_out").rpartition(".")
    return f"unet.{parent}.processor.{leaf}_lora.down.weight"


def test_attention_processors_of_old_files_match_diffusers(unet: MetaModel) -> None:
    modules = [module for module in _modules(unet) if module.endswith(ATTENTION)]
    given = _tagged([_processor_key(module) for module in modules])
    theirs = {float(tensor): name for name, tensor in convert_unet_state_dict_to_peft(given).items()}
    for key, module in _ours(given, unet).items():
        assert f"{module}.lora_A.weight" == theirs[float(given[key])]


@pytest.mark.parametrize("branch", ["to_{}_lora.down", "{}_proj.lora_linear_layer.down"])
@pytest.mark.parametrize("leaf", ["q", "k", "v", "out"])
def test_encoder_names_of_diffusers_match_diffusers(branch: str, leaf: str, text: MetaModel) -> None:
    key = f"text_encoder_2.text_model.encoder.layers.1.self_attn.{branch.format(leaf)}.weight"
    # diffusers recognizes the convention of a file by an output projection.
    other = f"text_encoder_2.text_model.encoder.layers.0.self_attn.{branch.format('out')}.weight"
    theirs = next(iter(convert_state_dict_to_peft({key: torch.zeros(1, 1), other: torch.zeros(1, 1)})))
    assert theirs == f"{_ours([key], text)[key]}.lora_A.weight"


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("unet.{}.lora.down.weight", "mid_block.resnets.0.conv1"),
        ("unet.{}.lora_B.weight", "up_blocks.0.resnets.0.conv_shortcut"),
        ("base_model.model.{}.lora_A.weight", "down_blocks.1.attentions.0.proj_in"),
        ("unet.base_model.model.{}.lora_A.default.weight", "add_embedding.linear_1"),
        ("{}.lora_A.weight", "time_embedding.linear_2"),
        ("unet.{}.alpha", "conv_in"),
        ("unet.{}.lora.down.weight.alpha", "conv_out"),
    ],
)
def test_every_spelling_of_a_unet_module_is_known(key: str, module: str, unet: MetaModel) -> None:
    assert _ours([key.format(module)], unet) == {key.format(module): f"unet.{module}"}


def test_ldm_names_with_dots_are_known(unet: MetaModel) -> None:
    key = "diffusion_model.output_blocks.5.2.conv.lora_up.weight"
    assert _ours([key], unet) == {key: "unet.up_blocks.1.upsamplers.0.conv"}


def test_encoders_are_known_without_text_model(text: MetaModel) -> None:
    keys = ["text_encoder_2.encoder.layers.0.mlp.fc1.lora_A.weight", "lora_te2_text_projection.lora_up.weight"]
    modules = ["text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2.text_projection"]
    assert list(_ours(keys, text).values()) == modules


@pytest.mark.parametrize("model", ["unet", "text"])
def test_no_two_modules_share_a_spelling(model: str, request: pytest.FixtureRequest) -> None:
    meta: MetaModel = request.getfixturevalue(model)
    component: Any = {"unet": "unet", "text": "text_encoder_2"}[model]
    spellings = module_spellings(component, meta.state, meta.config)
    for module in _modules(meta):
        assert spellings[module] == spellings[module.replace(".", "_")] == module


@pytest.mark.parametrize(
    "key",
    [
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "lora_te3_encoder_block_0.lora_down.weight",
        "lora_transformer_blocks_0.lora_up.weight", "text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
    ],
)  # fmt: skip
def test_modules_of_other_models_have_no_place(key: str) -> None:
    split = split_key(key)
    assert split is not None
    assert place_module(split[0]) is None


def test_checkpoint_tensors_are_not_lora_keys() -> None:
    names = ["unet.conv_in.weight", "model.diffusion_model.out.2.bias", "alphas_cumprod", "lora_unet_conv_in"]
    assert [split_key(name) for name in names] == [None] * 4
    assert [foreign_format(name) for name in names] == [None] * 4
