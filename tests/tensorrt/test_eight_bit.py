"""Plans in 8 bits by the real builder: which kernels really compute in 8 bits, read from its log."""

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from sdxl_trt.benchmarks.full_size.exporters import quantize_unets
from sdxl_trt.benchmarks.full_size.layer_types import Count, LayerTypes, count_layer_types
from sdxl_trt.engines.build.process import BuildJob, build_plan
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.bundle.profile import Profile
from sdxl_trt.engines.bundle.tensor_table import AdapterTable, TensorRecord
from sdxl_trt.engines.plans.sizes import profiles_of, rank_range, stage_sizes
from sdxl_trt.export.components import save_graph
from sdxl_trt.export.eight_bit import (
    Ranges,
    add_range_outputs,
    find_layers,
    quantize_for_devices,
    reason_to_exclude,
    refer_to,
    write_eight_bit,
)
from sdxl_trt.mini.embedded import bundle_path

pytestmark = pytest.mark.usefixtures("tensorrt")
Scheme = Literal["int8", "fp8"]
SCHEMES: tuple[Scheme, ...] = ("int8", "fp8")
WIDTH, HEADS, SIDE = 64, 2, 16


def _write_block(folder: Path) -> AdapterTable:
    """Write a block in fp16: two convolutions, the first of which stays in fp16, and an attention. Return its table."""
    half = TensorProto.FLOAT16
    shapes = {"conv_in": (WIDTH, 4, 3, 3), "conv": (WIDTH, WIDTH, 3, 3)}
    shapes |= dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"), (WIDTH, WIDTH))
    rng, weights, records, data = np.random.default_rng(0), [], [], b""
    for module, shape in shapes.items():
        values = (rng.standard_normal(shape) / WIDTH).astype(np.float16)
        weight = numpy_helper.from_array(values, f"{module}.weight")
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights.data"), ("offset", len(data)), ("length", values.nbytes)):
            weight.external_data.add(key=key, value=str(value))
        weights.append(weight)
        records.append(TensorRecord(name=weight.name, shape=shape, dtype="float16", offset=len(data)))
        data += values.tobytes()
    nodes = [
        helper.make_node("Conv", ["x", "conv_in.weight"], ["wide"], pads=[1] * 4),
        helper.make_node("Conv", ["wide", "conv.weight"], ["convolved"], pads=[1] * 4),
        helper.make_node("Reshape", ["convolved", "flat"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["tokens"], perm=[0, 2, 1]),
    ]
    for name in "qkv":
        nodes += [
            helper.make_node("MatMul", ["tokens", f"attn.to_{name}.weight"], [f"{name}.wide"]),
            helper.make_node("Reshape", [f"{name}.wide", "heads"], [f"{name}.split"]),
            helper.make_node("Transpose", [f"{name}.split"], [name], perm=[0, 2, 1, 3]),
        ]
    nodes += [
        helper.make_node("Attention", ["q", "k", "v"], ["found"]),
        helper.make_node("Transpose", ["found"], ["turned"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["turned", "whole"], ["joined"]),
        helper.make_node("MatMul", ["joined", "attn.to_out.0.weight"], ["y"]),
    ]
    for node in nodes:
        node.name = node.output[0]
    sizes = {"flat": [2, WIDTH, -1], "heads": [2, -1, HEADS, WIDTH // HEADS], "whole": [2, -1, WIDTH]}
    weights += [numpy_helper.from_array(np.array(size, np.int64), name) for name, size in sizes.items()]
    graph = helper.make_graph(
        nodes, "block", [helper.make_tensor_value_info("x", half, [2, 4, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", half, None)], weights,
    )  # fmt: skip
    folder.mkdir()
    (folder / "weights.data").write_bytes(data)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return AdapterTable(tensors=tuple(records))


def _quantized_block(folder: Path, scheme: Scheme) -> Path:
    """Write the block in 8 bits, with assumed ranges, and return its graph."""
    source, out = folder / "floats", folder / "graph"
    table = _write_block(source)
    out.mkdir()
    ranges = Ranges("block", dict.fromkeys(add_range_outputs(ir.load(source / "model.onnx")).outputs, (-8.0, 8.0)))
    model = ir.load(source / "model.onnx")
    layers = {layer.module: layer for layer in find_layers(model) if reason_to_exclude(layer.module) is None}
    weights = write_eight_bit(table, source, out, layers, ranges, scheme)
    refer_to(model, weights, out)
    quantize_for_devices(model, layers.values(), weights, ranges, scheme, out)
    save_graph(model, out / "model.onnx")
    return out / "model.onnx"


def _types(job: BuildJob) -> LayerTypes:
    build_plan(job)
    assert "[E]" not in job.log.read_text()
    return count_layer_types(job.log)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_block_computes_in_8_bits_and_fp8_also_its_attention(scheme: Scheme, tmp_path: Path) -> None:
    job = BuildJob(
        component="block",
        graph=_quantized_block(tmp_path, scheme),
        profiles=(Profile(shapes={"x": ((2, 4, SIDE, SIDE),) * 3}),),
        flavour="tensorrt-rtx",
        plan=tmp_path / "plan",
        log=tmp_path / "log",
        list_layers=True,
    )
    found = _types(job)
    assert found.linears == Count(2, 2, 1.0), "queries, keys and values are one product"
    assert found.convolutions == Count(2, 1, round(WIDTH / (WIDTH + 4), 4))
    assert found.attentions == (Count(1, 1, 1.0) if scheme == "fp8" else Count(1, 0, 0.0))
    assert found.fused_attentions == 1


@pytest.fixture(scope="module", params=SCHEMES)
def unets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return the embedded pair's UNets in 8 bits, with assumed ranges."""
    return quantize_unets(bundle_path(), request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.builds
@pytest.mark.parametrize("slots", [False, True], ids=["plain", "loras"])
@pytest.mark.parametrize("name", ["unet", "refiner_unet"])
def test_the_embedded_unets_compute_in_8_bits(name: str, slots: bool, unets: Bundle, tmp_path: Path) -> None:
    whole, component = read_bundle(bundle_path()).manifest, unets.manifest.components[name]
    graph = component.planned_graph(8 if slots else 0)
    assert graph
    assert component.quantization
    job = BuildJob(
        component=name,
        graph=unets.path(graph),
        profiles=profiles_of(component, stage_sizes(whole), whole.base.vae.factor)[:1],
        lora_rank=rank_range(8) if slots else None,
        flavour="tensorrt-rtx",
        plan=tmp_path / "plan",
        log=tmp_path / "log",
        list_layers=True,
    )
    found = _types(job)
    assert found.linears.share > 0.95
    assert found.convolutions.share > 0.9
    assert found.convolutions.eight_bit == component.quantization.convolutions
    attentions = component.quantization.attentions
    assert found.attentions.eight_bit == attentions
    assert found.attentions.all == attentions or component.precision == "int8"
