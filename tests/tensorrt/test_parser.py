"""The real TensorRT parser accepts every graph that we write, and a plan can be built from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.export import Options, export_bundle
from sdxl_trt.mini.embedded import bundle_path

Run = Callable[..., tuple[int, dict[str, Any]]]
LONGER = (pytest.mark.compares, pytest.mark.xdist_group("apart"))
DTYPES = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64"}


def _check(report: dict[str, Any], root: Path) -> None:
    """Compare the parsed networks with the manifest of the bundle at `root`."""
    components = read_bundle(root).manifest.components
    parsed = {graph["graph"].removeprefix(f"{root}/"): graph for graph in report["parsed"]}
    assert parsed.keys() == components.keys()
    for name, graph in parsed.items():
        assert (graph["accepted"], graph["errors"], graph["unknown"]) == (True, [], []), name
        assert graph["layers"] > sum(graph["operators"].values()) / 2, "an empty network was accepted"
        expected = {
            spec.name: [DTYPES[spec.dtype], [axis if isinstance(axis, int) else -1 for axis in spec.shape]]
            for spec in components[name].inputs
        }
        assert graph["inputs"] == expected, "not strongly typed, or not dynamic"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["outline", pytest.param("apart", marks=LONGER), "legacy"])
def test_every_graph_of_a_pair_is_accepted(name: str, pairs: Any, run_parser: Run) -> None:
    bundle = pairs(name).bundle
    code, report = run_parser(bundle)
    _check(report, bundle)
    assert code == 0


@pytest.mark.slow
@pytest.mark.builds
def test_bf16_and_mixed_graphs_are_accepted_and_built(pairs: Any, run_parser: Run, tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider cannot run the former: this test proves that TensorRT accepts it."""
    parts = frozenset({"unet", "vae_decoder"})
    options = Options("bf16", vae_precision="mixed", components=parts)
    bundle = export_bundle(pairs("legacy").base, None, tmp_path / "bf16", options)
    names = ("unet", "unet_shallow", "vae_decoder")
    graphs = [bundle.path(bundle.manifest.components[name].graph) for name in names]
    code, report = run_parser(*graphs, "--build")
    assert code == 0, report
    assert [graph["errors"] + graph["unknown"] for graph in report["parsed"]] == [[], [], []]
    assert all(built["size"] > 0 for built in report["built"])


def test_the_embedded_pair_is_accepted(run_parser: Run) -> None:
    code, report = run_parser(bundle_path())
    _check(report, bundle_path())
    assert code == 0


@pytest.mark.slow
def test_a_plan_is_built_with_a_dynamic_profile(pairs: Any, run_parser: Run) -> None:
    """An fp32 attention has no fused kernel: the builder fails unless it may be decomposed."""
    root = pairs("apart").bundle
    code, report = run_parser(root / "vae_decoder/model.onnx", root / "unet/model.onnx", "--build")
    assert code == 0
    for built, folder in zip(report["built"], ("vae_decoder", "unet"), strict=True):
        # The builder pads and rearranges weights; a plan far smaller than them would contain none.
        assert built["size"] > (root / folder / "weights.data").stat().st_size / 2
        assert built["activations"] > 0


def _save(path: Path, nodes: list[onnx.NodeProto], names: dict[str, int]) -> None:
    """Save a graph from the inputs `names` (with their types) to `out`, with an external weight `w`."""
    weight = numpy_helper.from_array(np.full((8, 8), 0.5, np.float32), "w")
    inputs = [helper.make_tensor_value_info(name, kind, ["n", 8]) for name, kind in names.items()]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "planted", inputs, outputs, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location="weights.data", size_threshold=0)


def test_external_weights_are_read(run_parser: Run, tmp_path: Path) -> None:
    """The same graph is rejected without its weights file: the weights were not skipped."""
    path = tmp_path / "model.onnx"
    _save(path, [helper.make_node("MatMul", ["a", "w"], ["out"])], {"a": TensorProto.FLOAT})
    assert run_parser(path)[0] == 0
    (tmp_path / "weights.data").unlink()
    code, report = run_parser(path)
    assert (code, report["parsed"][0]["accepted"]) == (1, False)


@pytest.mark.parametrize(
    ("nodes", "names", "unknown"),
    [
        ([helper.make_node("NoSuchOperator", ["a"], ["out"])], {"a": TensorProto.FLOAT}, ["NoSuchOperator"]),
        (
            [
                helper.make_node("SplitToSequence", ["a"], ["parts"], axis=1),
                helper.make_node("SequenceAt", ["parts", "i"], ["out"]),
            ],
            {"a": TensorProto.FLOAT, "i": TensorProto.INT64},
            ["SequenceAt", "SplitToSequence"],
        ),
        # The graph that torch's exporter writes if diffusers concatenates a half and a float.
        (
            [helper.make_node("Concat", ["a", "b"], ["out"], axis=1)],
            {"a": TensorProto.FLOAT, "b": TensorProto.FLOAT16},
            [],
        ),
    ],
    ids=["unknown", "sequence", "mixed-types"],
)
def test_what_tensorrt_rejects_is_reported(
    nodes: list[onnx.NodeProto], names: dict[str, int], unknown: list[str], run_parser: Run, tmp_path: Path
) -> None:
    _save(tmp_path / "model.onnx", nodes, names)
    code, report = run_parser(tmp_path / "model.onnx")
    graph = report["parsed"][0]
    assert (code, graph["accepted"], sorted(graph["unknown"])) == (1, False, unknown)
    assert graph["errors"]
