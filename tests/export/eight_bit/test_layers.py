"""Which layers of a graph compute in 8 bits, in all graphs of a component the same."""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest

from sdxl_trt.export.eight_bit.layers import EXCLUDED, find_attentions, find_layers, reason_to_exclude

KEPT = {
    "conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2", "mid_block.resnets.0.time_emb_proj",
    "down_blocks.0.resnets.1.conv_shortcut", "decoder.conv_in", "decoder.conv_out", "encoder.conv_in", "quant_conv",
    "post_quant_conv", "decoder.up_blocks.2.resnets.0.conv_shortcut",
}  # fmt: skip
NARROW = {"down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.proj_in", "decoder.mid_block.attentions.0.to_q",
          "up_blocks.1.upsamplers.0.conv", "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"}  # fmt: skip


def test_layers_that_carry_much_with_little_work_stay_in_floating_point() -> None:
    assert {module for module in KEPT | NARROW if reason_to_exclude(module)} == KEPT
    assert all(reason in EXCLUDED.values() for reason in map(reason_to_exclude, KEPT))
    further = {"up_blocks.1.*": "by hand"}
    assert reason_to_exclude("up_blocks.1.upsamplers.0.conv", further) == "by hand"
    assert reason_to_exclude("up_blocks.10.upsamplers.0.conv", further) is None
    assert reason_to_exclude("conv_in", further) == EXCLUDED["*conv_in"]


@pytest.mark.parametrize("component", ["unet", "refiner_unet", "vae_decoder"])
def test_both_graphs_of_a_component_have_the_same_layers(component: str, pairs: Callable[[str], Any]) -> None:
    """The graph for a CPU splits the weight of a gated layer: each half is a layer with a half of the scales."""
    folder = pairs("outline").bundle / component
    graphs = [ir.load(folder / name) for name in ("model.onnx", "cpu.onnx")]
    device, cpu = (find_layers(graph) for graph in graphs)
    assert len({layer.module for layer in device}) == len(device)
    kinds = [{layer.module: (layer.kind, layer.axis, layer.weight.name) for layer in each} for each in (device, cpu)]
    assert kinds[0] == kinds[1]
    shapes = {str(name): value.shape for name, value in graphs[0].graph.initializers.items() if value.shape is not None}
    stored = {name for name, shape in shapes.items() if len(shape) in (2, 4) and name.endswith(".weight")}
    assert {f"{layer.module}.weight" for layer in device} == stored  # all matrices and kernels
    halves = [layer for layer in cpu if layer.half is not None]
    gated = {layer.module for layer in cpu if layer.module.endswith("ff.net.0.proj")}
    assert {layer.module for layer in halves} == gated
    assert sorted(layer.half for layer in halves if layer.half is not None) == [0] * len(gated) + [1] * len(gated)
    for module in gated:
        one, other = (layer for layer in halves if layer.module == module)
        assert (one.half, other.half) == (0, 1)
        assert one.source is other.source
        split = one.node.inputs[1]
        assert split is not None
        assert split.producer() is not None
    assert all(layer.half is None for layer in device)


def test_attentions_belong_to_the_module_that_makes_their_queries(pairs: Callable[[str], Any]) -> None:
    folder = pairs("outline").bundle / "unet"
    found = [[attention.module for attention in find_attentions(ir.load(folder / graph))]
             for graph in ("model.onnx", "cpu.onnx")]  # fmt: skip
    assert sorted(found[0]) == sorted(found[1])
    modules = {layer.module for layer in find_layers(ir.load(folder / "model.onnx"))}
    assert len(set(found[0])) == len(found[0])
    assert {f"{module}.to_q" for module in found[0]} == {each for each in modules if each.endswith(".to_q")}
