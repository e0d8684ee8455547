"""Node counts equal onnx's own, subgraphs included."""

from collections import Counter
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from sdxl_trt.benchmarks.full_size.node_counts import count_operators, main, table
from sdxl_trt.engines.bundle import read_bundle
from sdxl_trt.mini.embedded import bundle_path


def test_the_embedded_bundle_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(bundle_path())]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [cell.strip() for cell in lines[0].strip("|").split("|")][1:]
    sums = [int(cell) for cell in lines[-1].strip("|").split("|")[1:]]
    bundle = read_bundle(bundle_path())
    for name, nodes in zip(names, sums, strict=True):
        path = bundle.path(bundle.manifest.components[name].graph)
        model = onnx.load(path, load_external_data=False)
        assert nodes == len(model.graph.node)
        assert count_operators(path) == Counter(n.op_type for n in model.graph.node)
    assert "unet" in names


def test_subgraphs_and_foreign_domains_are_counted(tmp_path: Path) -> None:
    def branch(operator: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(operator, ["x"], ["y"])], operator, [], [out])

    chosen = helper.make_node("If", ["c"], ["z"], then_branch=branch("Abs"), else_branch=branch("Neg"))
    foreign = helper.make_node("Abs", ["z"], ["out"], domain="com.example")
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]), helper.make_tensor_value_info("c", TensorProto.BOOL, [])]  # fmt: skip # noqa: E501
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1])]
    onnx.save(helper.make_model(helper.make_graph([chosen, foreign], "g", values, outputs)), tmp_path / "model.onnx")
    counts = count_operators(tmp_path / "model.onnx")
    assert counts == {"Abs": 1, "If": 1, "Neg": 1, "com.example.Abs": 1}


def test_the_table_is_markdown() -> None:
    text = table({"unet": {"MatMul": 3, "Add": 1}, "vae": {"Add": 4}})
    assert text.splitlines() == [
        "| operator | unet | vae |",
        "| --- | ---: | ---: |",
        "| Add | 1 | 4 |",
        "| MatMul | 3 |  |",
        "| **all nodes** | 4 | 4 |",
    ]


def test_a_missing_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
