"""What a traced graph holds: no transposition of weights, no metadata, the same bytes for the same input."""

from pathlib import Path

import onnx_ir as ir
import pytest
from small_models.modules import COMMON, IDS, POOLED, export_module, real_module

from sdxl_trt.engines.errors import SourceError
from sdxl_trt.export.graph.models import build_model
from sdxl_trt.export.graph.signatures import make_graph

pytestmark = pytest.mark.usefixtures("translations_once")


def _export_linear(folder: Path) -> Path:
    config = COMMON | {"use_linear_projection": True}
    module = real_module("UNet2DConditionModel", config)
    return export_module("unet", "UNet2DConditionModel", config, module, folder, time_ids=IDS, pooled=POOLED)


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the graph of a UNet with linear projections."""
    return _export_linear(tmp_path_factory.mktemp("linear"))


@pytest.mark.slow
def test_no_weight_is_transposed_at_run_time_and_no_metadata_remains(linear: Path) -> None:
    graph = ir.load(linear).graph
    weights = set(graph.initializers)
    assert [node.name for node in graph if node.op_type == "Transpose" and node.inputs[0].name in weights] == []
    assert {node.op_type for node in graph} & {"Identity", "SequenceAt", "SplitToSequence", "Constant"} == set()
    assert {"Attention", "GroupNormalization"} <= {node.op_type for node in graph}
    assert all(not node.metadata_props and not node.doc_string for node in graph)
    used = {value.name for node in graph for value in node.inputs if value is not None}
    assert weights <= used


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(linear: Path, tmp_path: Path) -> None:
    again = _export_linear(tmp_path)
    assert again.read_bytes() == linear.read_bytes()
    assert again.with_name("weights.data").read_bytes() == linear.with_name("weights.data").read_bytes()


def test_conditions_of_the_wrong_width_are_refused() -> None:
    model = build_model("UNet2DConditionModel", COMMON, "test")
    with pytest.raises(SourceError, match="requires_aesthetics_score"):
        make_graph("unet", model, time_ids=5, pooled=POOLED, where="test")
    plain = build_model("UNet2DConditionModel", COMMON | {"addition_embed_type": None}, "test")
    with pytest.raises(SourceError, match="text_time"):
        make_graph("unet", plain, time_ids=IDS, pooled=POOLED, where="test")
    with pytest.raises(SourceError, match="refuses this config"):
        build_model("UNet2DConditionModel", COMMON | {"block_out_channels": (8, 16, 32)}, "test")
    with pytest.raises(SourceError, match="not an SDXL component"):
        build_model("os.system", {}, "test")
