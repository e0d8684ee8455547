"""Rewrites do not change the outputs: every graph gives the same numbers before and after."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from sdxl_trt.export.graph.passes import simplify

Arrays = dict[str, np.ndarray]
Nodes = list[tuple[str, list[str], list[str], dict[str, object]]]


def _model(
    nodes: Nodes, shapes: dict[str, list[int | str]], out: list[int | str], constants: Arrays, weights: Arrays
) -> ir.Model:
    """Return a model like the tracer's: constants as nodes, weights as initializers without values."""
    made = [helper.make_node(op, ins, outs, **attributes) for op, ins, outs, attributes in nodes]
    made = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
        for name, value in constants.items()
    ] + made
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, out)
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(made, "g", inputs, [output], initializer=initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model = ir.from_proto(proto)
    for name in weights:
        model.graph.initializers[name].const_value = None
    return model


def _run(model: ir.Model, feed: Arrays, weights: Arrays, permutations: dict[str, tuple[int, ...]]) -> np.ndarray:
    for name, value in weights.items():
        if name in model.graph.initializers:
            stored = value.transpose(permutations[name]) if name in permutations else value
            model.graph.initializers[name].const_value = ir.tensor(np.ascontiguousarray(stored), name=name)
    serialized = ir.to_proto(model).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(serialized, options, providers=["CPUExecutionProvider"]).run(["out"], feed)[0]


@pytest.fixture
def check(rng: np.random.Generator) -> Callable[..., tuple[ir.Model, dict[str, tuple[int, ...]]]]:
    """Return a function that simplifies a graph and compares its outputs before and after."""

    def run(
        nodes: Nodes, shapes: dict[str, list[int | str]], out: list[int | str], constants: Arrays | None = None,
        weights: Arrays | None = None,
    ) -> tuple[ir.Model, dict[str, tuple[int, ...]]]:  # fmt: skip
        feed = {
            name: rng.standard_normal([size if isinstance(size, int) else 2 for size in shape]).astype(np.float32)
            for name, shape in shapes.items()
        }
        arguments = (nodes, shapes, out, constants or {}, weights or {})
        before = _run(_model(*arguments), feed, weights or {}, {})
        model = _model(*arguments)
        permutations = simplify(model)
        after = _run(model, feed, weights or {}, permutations)
        assert after.shape == before.shape
        np.testing.assert_allclose(after, before, rtol=1e-6)
        return model, permutations

    return run


def _ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("op", ["Mul", "Div"])
@pytest.mark.parametrize("one", [np.float32(1), np.ones(1, np.float32)])
def test_neutral_factors_are_removed(check, op: str, one: np.ndarray) -> None:
    nodes: Nodes = [(op, ["x", "one"], ["y"], {}), ("Neg", ["y"], ["out"], {})]
    model, _ = check(nodes, {"x": ["n", 3]}, ["n", 3], {"one": np.asarray(one)})
    assert _ops(model) == ["Neg"]


@pytest.mark.parametrize(
    ("op", "other"),
    [("Mul", np.float32(1.0001)), ("Div", np.float32(2)), ("Add", np.float32(1)), ("Sub", np.float32(1)),
     ("Mul", np.ones((2, 1, 1), np.float32)), ("Mul", np.ones((1, 1, 1), np.float32)),
     ("Mul", np.array([1, 2, 1], np.float32))],
)  # fmt: skip
def test_operators_that_change_values_or_shapes_stay(check, op: str, other: np.ndarray) -> None:
    rank = max(2, np.ndim(other))
    nodes: Nodes = [(op, ["x", "other"], ["y"], {}), ("Neg", ["y"], ["out"], {})]
    model, _ = check(nodes, {"x": [2, 3]}, [2] * (rank - 2) + [2, 3], {"other": np.asarray(other)})
    assert op in _ops(model)


def test_a_factor_of_one_element_gives_a_scalar_its_axis(check) -> None:
    nodes: Nodes = [("Mul", ["x", "one"], ["y"], {}), ("Neg", ["y"], ["out"], {})]
    check(nodes, {"x": []}, [1], {"one": np.ones(1, np.float32)})


def test_one_divided_by_x_is_not_x(check) -> None:
    nodes: Nodes = [("Div", ["one", "x"], ["y"], {}), ("Neg", ["y"], ["out"], {})]
    model, _ = check(nodes, {"x": [2, 3]}, [2, 3], {"one": np.ones((), np.float32)})
    assert "Div" in _ops(model)


def test_a_neutral_factor_at_the_output_keeps_the_output(check) -> None:
    model, _ = check([("Mul", ["x", "one"], ["out"], {})], {"x": [2, 3]}, [2, 3], {"one": np.ones((), np.float32)})
    assert [value.name for value in model.graph.outputs] == ["out"]


def test_identities_duplicates_and_dead_nodes_are_removed(check) -> None:
    nodes: Nodes = [
        ("Identity", ["x"], ["i"], {}), ("Neg", ["i"], ["a"], {}), ("Neg", ["x"], ["b"], {}),
        ("Exp", ["x"], ["dead"], {}), ("Add", ["a", "b"], ["out"], {}),
    ]  # fmt: skip
    model, _ = check(nodes, {"x": [2, 3]}, [2, 3])
    assert _ops(model) == ["Neg", "Add"]


def test_a_transposed_weight_is_stored_transposed(check, rng: np.random.Generator) -> None:
    weights = {"w": rng.standard_normal((5, 3)).astype(np.float32)}
    nodes: Nodes = [("Transpose", ["w"], ["t"], {"perm": [1, 0]}), ("MatMul", ["x", "t"], ["out"], {})]
    model, permutations = check(nodes, {"x": ["n", 3]}, ["n", 5], weights=weights)
    assert permutations == {"w": (1, 0)}
    assert _ops(model) == ["MatMul"]
    assert list(model.graph.initializers["w"].shape) == [3, 5]


def test_a_permutation_that_is_not_its_own_inverse(check, rng: np.random.Generator) -> None:
    weights = {"w": rng.standard_normal((2, 3, 4)).astype(np.float32)}
    nodes: Nodes = [("Transpose", ["w"], ["t"], {"perm": [2, 0, 1]}), ("Add", ["x", "t"], ["out"], {})]
    model, permutations = check(nodes, {"x": [4, 2, 3]}, [4, 2, 3], weights=weights)
    assert permutations == {"w": (2, 0, 1)}
    assert list(model.graph.initializers["w"].shape) == [4, 2, 3]


def test_a_weight_used_both_ways_is_not_transposed(check, rng: np.random.Generator) -> None:
    weights = {"w": rng.standard_normal((3, 3)).astype(np.float32)}
    nodes: Nodes = [
        ("Transpose", ["w"], ["t"], {"perm": [1, 0]}), ("MatMul", ["x", "t"], ["a"], {}),
        ("MatMul", ["a", "w"], ["out"], {}),
    ]  # fmt: skip
    model, permutations = check(nodes, {"x": ["n", 3]}, ["n", 3], weights=weights)
    assert permutations == {}
    assert "Transpose" in _ops(model)


def test_an_activation_is_still_transposed(check) -> None:
    model, permutations = check([("Transpose", ["x"], ["out"], {"perm": [1, 0]})], {"x": [2, 3]}, [3, 2])
    assert (_ops(model), permutations) == (["Transpose"], {})


def test_constants_become_initializers_and_weights_get_no_value(rng: np.random.Generator) -> None:
    nodes: Nodes = [("MatMul", ["x", "w"], ["p"], {}), ("Add", ["p", "c"], ["out"], {})]
    constants, weights = {"c": np.float32([1, 2, 3])}, {"w": np.ones((3, 3), np.float32)}
    model = _model(nodes, {"x": ["n", 3]}, ["n", 3], constants, weights)
    simplify(model)
    assert _ops(model) == ["MatMul", "Add"]
    assert model.graph.initializers["w"].const_value is None
    assert len(model.graph.initializers) == 2


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    nodes: Nodes = [("Neg", ["x"], ["y"], {}), ("Mul", ["y", "c"], ["out"], {})]
    first, second = (_model(nodes, {"x": ["n", 3]}, ["n", 3], {"c": np.float32([1, 2, 3])}, {}) for _ in range(2))
    simplify(first)
    simplify(second)
    assert ir.to_proto(first).SerializeToString() == ir.to_proto(second).SerializeToString()
    inner = [value for node in first.graph for value in node.outputs if not value.is_graph_output()]
    assert all(value.shape is None for value in inner)
