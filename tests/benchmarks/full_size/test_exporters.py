"""The measured programs pass on their arguments, and the check refuses an invalid graph."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from sdxl_trt.benchmarks.full_size.exporters import main


def _save(folder: Path, operator: str) -> None:
    folder.mkdir(parents=True)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "g", values[:1], values[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "model.onnx"
    )


@pytest.mark.parametrize(("operator", "valid"), [("Abs", True), ("NoSuchOperator", False)])
def test_exported_graphs_are_checked(
    operator: str, valid: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[str] = []

    def export(arguments: list[str]) -> int:
        given.extend(arguments)
        _save(tmp_path / "out/unet", operator)
        return 0

    monkeypatch.setattr("sdxl_trt.export.cli.export.main", export)
    arguments = ["--base", "a folder", "--components", "unet", "--out", str(tmp_path / "out")]
    if valid:
        assert main(["ours", *arguments]) == 0
        assert capsys.readouterr().out == "checked 1 graphs\n"
    else:
        with pytest.raises(onnx.checker.ValidationError, match="NoSuchOperator"):
            main(["ours", *arguments])
    assert given == arguments


def test_a_failed_export_is_not_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sdxl_trt.export.cli.export.main", lambda _: 5)
    assert main(["ours", "--out", "nowhere"]) == 5
    assert capsys.readouterr().out == ""
