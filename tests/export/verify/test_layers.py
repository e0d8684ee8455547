"""Every 8-bit layer is looked at by itself: a fault of one is found that no comparison of results would show."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from sdxl_trt.engines.bundle import Component, read_bundle
from sdxl_trt.export.components import ComponentPlan, Options, plan_components
from sdxl_trt.export.eight_bit import Ranges, read_ranges
from sdxl_trt.export.sources import open_source
from sdxl_trt.export.verify.layers import check_layers

CONV = "up_blocks.2.resnets.1.conv2"
GRAPHS = ("model.onnx", "cpu.onnx", "adapters.onnx")


class Checked:
    """A copy of a component whose graphs can be changed, and what is said of its layers."""

    def __init__(self, bundle: Path, name: str, plan: ComponentPlan, folder: Path) -> None:
        self.root, self.plan = folder, plan
        shutil.copytree(bundle / name, folder / name)
        self.record: Component = read_bundle(bundle, files=False).manifest.components[name]
        self.ranges: Ranges = read_ranges(bundle / name / "ranges.json", name)
        self.folder = folder / name

    def problems(self) -> list[str]:
        return check_layers(self.root, self.record, self.plan, self.ranges)

    def change(self, graph: str, change: Callable[[ir.Model], None]) -> None:
        model = ir.load(self.folder / graph)
        change(model)
        ir.save(model, self.folder / graph)


@pytest.fixture(scope="module")
def plans(pairs: Callable[[str], Any]) -> dict[str, ComponentPlan]:
    options = Options(precision="int8", vae_precision="int8")
    base = open_source(pairs("outline").base, "base")
    return plan_components(base, None, options, lambda _: None)[0]


@pytest.fixture
def checked(eight_bit_bundle: Path, plans: dict[str, ComponentPlan], tmp_path: Path) -> Checked:
    return Checked(eight_bit_bundle, "unet", plans["unet"], tmp_path)


def test_layers_as_they_were_exported_have_no_problem(
    checked: Checked, eight_bit_bundle: Path, fp8_bundle: Path, plans: dict[str, ComponentPlan], tmp_path: Path
) -> None:
    decoder = Checked(eight_bit_bundle, "vae_decoder", plans["vae_decoder"], tmp_path / "decoder")
    fp8 = Checked(fp8_bundle, "unet", plans["unet"].revised(precision="fp8"), tmp_path / "fp8")
    assert [each.problems() for each in (checked, decoder, fp8)] == [[], [], []]


def _constants(model: ir.Model, ending: str) -> Iterator[ir.Value]:
    return (value for name, value in model.graph.initializers.items() if name.endswith(ending))


def _set(value: ir.Value, change: Callable[[Any], Any]) -> None:
    assert value.const_value is not None
    array = value.const_value.numpy()
    value.const_value = ir.tensor(change(array).astype(array.dtype), name=value.name)


def _double_scale(model: ir.Model) -> None:
    _set(next(_constants(model, "/quantized.scale")), lambda scale: scale * 2)


def _double_weight_scale(model: ir.Model) -> None:
    _set(model.graph.initializers[f"{CONV}.weight_scale"], lambda scale: scale * 2)


def _move_weights(model: ir.Model) -> None:
    _set(model.graph.initializers[f"{CONV}.weight_scale/weight.zero"], lambda zero: zero + 1)


def _swap_scales(model: ir.Model) -> None:
    one, other = (model.graph.initializers[f"up_blocks.2.resnets.{name}.weight_scale"]
                  for name in ("0.conv2", "1.conv2"))  # fmt: skip
    one.const_value, other.const_value = other.const_value, one.const_value


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("fault", [_double_scale, _double_weight_scale, _move_weights, _swap_scales])
def test_a_fault_of_one_layer_is_found(checked: Checked, graph: str, fault: Callable[[ir.Model], None]) -> None:
    checked.change(graph, fault)
    (problem,) = checked.problems()
    assert problem.startswith(f"unet/{graph}: ")


def test_a_zero_point_that_is_off_by_one_is_found_where_it_is_read_and_where_it_is_both(checked: Checked) -> None:
    def at_both(model: ir.Model) -> None:
        _set(next(_constants(model, "/quantized.zero")), lambda zero: zero + 1)

    def at_one(model: ir.Model) -> None:
        fused = next(node for node in model.graph if node.op_type == "MatMulIntegerToFloat")
        zero = fused.inputs[4]
        assert zero is not None
        assert zero.const_value is not None
        wrong = ir.Value(name="wrong", const_value=ir.tensor(zero.const_value.numpy() + np.uint8(1), name="wrong"))
        model.graph.register_initializer(wrong)
        fused.replace_input_with(4, wrong)

    checked.change("cpu.onnx", at_both)
    assert "and is rounded to" in checked.problems()[0]
    checked.change("cpu.onnx", at_one)
    assert "is quantized with a scale and zero point of" in checked.problems()[0]


def test_a_bias_in_other_units_than_the_product_is_found(checked: Checked) -> None:
    checked.change("cpu.onnx", lambda model: _set(next(_constants(model, ".bias_scale")), lambda scale: scale * 1.01))
    (problem,) = checked.problems()
    assert "its bias is not in units of its input's scale times its weight's" in problem


def test_a_layer_that_lost_its_quantizers_is_missed(checked: Checked) -> None:
    def widen(model: ir.Model) -> None:
        quantizes = (node for node in model.graph if node.op_type == "QuantizeLinear" and node.inputs[0] is not None)
        quantize = next(quantizes)
        for wide, _ in list(quantize.outputs[0].uses()):
            ir.convenience.replace_all_uses_with(wide.outputs[0], quantize.inputs[0])  # type: ignore[arg-type]

    checked.change("model.onnx", widen)
    (problem,) = checked.problems()
    assert "layers compute in 8 bits, and" in problem
