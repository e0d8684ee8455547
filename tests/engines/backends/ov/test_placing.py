"""External weights as addresses: against the package onnx, and with graphs that point elsewhere."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from small_models.graphs import tiny_graph

from sdxl_trt.engines.backends.ov.placing import place_weights
from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.errors import CorruptError
from sdxl_trt.mini.embedded import bundle_path

ADDRESS = 0x7F0000001000


def _external(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


@pytest.mark.parametrize("name", ["unet", "vae_decoder", "text_encoder"])
def test_only_the_places_of_the_embedded_graphs_tensors_change(name: str) -> None:
    bundle = read_bundle(bundle_path())
    record = bundle.manifest.components[name]
    before = onnx.load_from_string(bundle.path(record.graph).read_bytes())
    graph = place_weights(before.SerializeToString(), record.weights.file, ADDRESS, record.weights.size)
    after = onnx.load_from_string(graph)
    placed = 0
    for old, new in zip(before.graph.initializer, after.graph.initializer, strict=True):
        if old.external_data:
            told, now = _external(old), _external(new)
            assert now == {
                "location": "*/_ORT_MEM_ADDR_/*",
                "offset": str(ADDRESS + int(told["offset"])),
                "length": told["length"],
            }
            placed += 1
        for each in (old, new):
            del each.external_data[:]
    assert placed > 20
    assert before == after


def _tensor(**places: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT16, dims=(2, 3))
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in places.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _in_a_sparse_one(tensor: TensorProto) -> Any:
    sparse = onnx.SparseTensorProto(values=tensor, dims=(6,))
    return helper.make_node("Constant", [], ["w"], sparse_value=sparse)


def _in_a_branch(tensor: TensorProto) -> Any:
    constant = helper.make_node("Constant", [], ["w"], value=tensor)
    inner = helper.make_graph([constant], "inner", [], [])
    return helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)


def _model(tensor: TensorProto, where: str) -> bytes:
    nodes = {"graph": [], "attribute": [helper.make_node("Constant", [], ["w"], value=tensor)],
             "branch": [_in_a_branch(tensor)], "sparse": [_in_a_sparse_one(tensor)]}[where]  # fmt: skip
    graph = helper.make_graph(nodes, "g", [], [], initializer=[tensor] if where == "graph" else [])
    return bytes(helper.make_model(graph).SerializeToString())


GOOD = {"location": "weights.data", "offset": "4", "length": "12"}


@pytest.mark.parametrize("where", ["graph", "attribute", "branch", "sparse"])
@pytest.mark.parametrize(
    "change",
    [
        {"location": "/etc/passwd"},
        {"location": "*/_ORT_MEM_ADDR_/*"},
        {"location": ""},
        {"offset": "5"},
        {"offset": "-1"},
        {"offset": "1e3"},
        {"length": "11"},
        {"length": "24"},
        {"length": "0"},
    ],
)
def test_a_tensor_elsewhere_is_refused_wherever_it_is(where: str, change: dict[str, str]) -> None:
    place_weights(_model(_tensor(**GOOD), where), "unet/weights.data", ADDRESS, 16)
    with pytest.raises(CorruptError, match=r"the graph beside unet/weights\.data is damaged"):
        place_weights(_model(_tensor(**{**GOOD, **change}), where), "unet/weights.data", ADDRESS, 16)


def test_an_external_tensor_without_a_place_and_one_of_an_unknown_type_are_refused() -> None:
    for tensor in (_tensor(), _tensor(**GOOD)):
        tensor.data_type = 99 if tensor.external_data else TensorProto.FLOAT16
        with pytest.raises(CorruptError):
            place_weights(_model(tensor, "graph"), "weights.data", ADDRESS, 16)


@given(st.integers(0, 400), st.binary(min_size=1, max_size=8))
def test_a_damaged_graph_is_an_error_or_has_every_tensor_in_the_map(at: int, noise: bytes) -> None:
    graph = bytearray(tiny_graph(np.zeros((3, 5), np.float32)))
    at = min(at, len(graph) - 1)
    graph[at : at + len(noise)] = noise
    try:
        placed = place_weights(bytes(graph), "weights.data", ADDRESS, 60)
        model = onnx.load_from_string(placed)
    except Exception as exc:  # noqa: BLE001 - protobuf raises its own for what it does not read
        assert isinstance(exc, CorruptError) or "DecodeError" in type(exc).__name__  # noqa: PT017
        return
    for tensor in model.graph.initializer:
        if told := _external(tensor):
            assert told["location"] == "*/_ORT_MEM_ADDR_/*"
            assert ADDRESS <= int(told["offset"]) <= ADDRESS + 60 - int(told["length"])


def test_a_graph_nested_without_end_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Constant", [], ["w"], value=_tensor(**GOOD))
    for _ in range(20):
        inner = helper.make_graph([node], "inner", [], [])
        node = helper.make_node("If", ["c"], ["y"], then_branch=inner)
    model = helper.make_model(helper.make_graph([node], "g", [], []))
    with pytest.raises(CorruptError, match="nested too deeply"):
        place_weights(bytes(model.SerializeToString()), "weights.data", ADDRESS, 16)
