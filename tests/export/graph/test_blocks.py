"""Blocks that are traced once: which count as equal, and that the module is restored afterwards."""

import contextlib
import operator
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from sdxl_trt.export.graph.blocks import DOMAIN, fingerprint, hollowed
from sdxl_trt.export.graph.models import build_model
from sdxl_trt.export.graph.signatures import make_graph
from sdxl_trt.export.graph.trace import trace_graph

pytestmark = pytest.mark.usefixtures("translations_once")
UNET = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "norm_num_groups": 4, "cross_attention_dim": 20,
    "projection_class_embeddings_input_dim": 72, "block_out_channels": (8, 16), "layers_per_block": 1,
    "attention_head_dim": 2, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "sample_size": 8,
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": 3,
    "use_linear_projection": True,
}  # fmt: skip


def _attention(**changes: Any) -> nn.Module:
    settings = {"dim": 16, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 20}
    return BasicTransformerBlock(**(settings | changes)).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 4, "attention_head_dim": 4},
        {"cross_attention_dim": 24},
        {"norm_eps": 1e-6},
        {"activation_fn": "gelu"},
        {"attention_bias": True},
        {"only_cross_attention": True},
        {"upcast_attention": True},
    ],
)
def test_a_different_setting_makes_a_different_block(changes: dict[str, Any]) -> None:
    assert fingerprint(_attention()) == fingerprint(_attention())
    assert fingerprint(_attention()) != fingerprint(_attention(**changes))


def test_dtypes_hooks_and_unknown_settings_make_blocks_different() -> None:
    def resnet() -> Any:
        return ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=4, groups=4)

    assert fingerprint(resnet()) == fingerprint(resnet())
    assert fingerprint(resnet()) != fingerprint(resnet().half())
    one, other = resnet(), resnet()
    for module in (one, other):
        module.conv1.register_forward_pre_hook(lambda module, inputs: inputs)
    assert fingerprint(one) != fingerprint(other)
    strange = resnet()
    strange.setting = {"a": 1}
    assert fingerprint(strange) != fingerprint(resnet())


def test_hollowed_modules_are_restored() -> None:
    model = build_model("UNet2DConditionModel", UNET, "test")
    before = {name: id(value) for name, value in model.module.named_parameters()}
    failing = contextlib.ExitStack()
    assert failing.enter_context(hollowed(model.module)) == {}
    assert sum(1 for _ in model.module.parameters()) < len(before) / 2
    failing.callback(operator.truediv, 1, 0)
    with pytest.raises(ZeroDivisionError):
        failing.close()
    assert {name: id(value) for name, value in model.module.named_parameters()} == before
    assert all("forward" not in vars(module) for module in model.module.modules())


@pytest.mark.slow
def test_every_copy_has_weights_of_its_own() -> None:
    model = build_model("UNet2DConditionModel", UNET, "test")
    graph = make_graph("unet", model, time_ids=6, pooled=24, where="test")
    traced = trace_graph(graph, "fp32", 23)
    expected = {f"model.{name}" for name in model.state}
    weights = {name: value for name, value in traced.graph.initializers.items() if value.const_value is None}
    assert set(weights) == expected
    assert all(tuple(value.shape) == model.state[name.removeprefix("model.")] for name, value in weights.items())
    assert all(list(value.uses()) for value in weights.values())
    assert DOMAIN not in {node.domain for node in traced.graph}
    assert DOMAIN not in traced.opset_imports
    names = [output.name for node in traced.graph for output in node.outputs]
    assert len(set(names)) == len(names)
    assert torch.onnx.is_in_onnx_export() is False
