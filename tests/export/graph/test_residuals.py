"""Residual inputs: which skip connection takes which residual, and which sums a ControlNet makes."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from sdxl_trt.engines.errors import SourceError
from sdxl_trt.export.graph.residuals import add_residuals
from sdxl_trt.export.graph.signatures import residual_names, residual_shapes

CONFIG = {"block_out_channels": (2, 3), "layers_per_block": 1}
NAMES = residual_names(5)
FLOAT = TensorProto.FLOAT


def _unet() -> ir.Model:
    """Return a graph like a UNet's: four skip connections, the last is used first; outputs are the four joins' sums.

    Skip i is the sample plus i, and also feeds a second output, which a residual must not change.
    """
    nodes, weights = [], []
    outputs = [helper.make_tensor_value_info("down", FLOAT, None)]
    for index in range(4):
        weights.append(helper.make_tensor(f"c{index}", FLOAT, [], [float(index)]))
        nodes.append(helper.make_node("Add", ["sample", f"c{index}"], [f"skip{index}"]))
    nodes.append(helper.make_node("Sum", [f"skip{index}" for index in range(4)], ["down"]))
    weights.append(helper.make_tensor("ones", FLOAT, [1, 2, 1, 1], [1.0, 1.0]))
    for place, index in enumerate(reversed(range(4))):
        nodes.append(helper.make_node("Concat", ["sample", f"skip{index}"], [f"join{place}"], axis=1))
        nodes.append(helper.make_node("Conv", [f"join{place}", "ones"], [f"up{place}"]))
        outputs.append(helper.make_tensor_value_info(f"up{place}", FLOAT, None))
    # Not a join of feature maps: as the embeddings of the timestep and the sizes.
    nodes.append(helper.make_node("Concat", ["sample", "sample"], ["other"], axis=1))
    outputs.append(helper.make_tensor_value_info("other", FLOAT, None))
    sample = helper.make_tensor_value_info("sample", FLOAT, ["rows", 1, "height", "width"])
    graph = helper.make_graph(nodes, "unet", [sample], outputs, weights)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def _run(model: ir.Model, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    proto = ir.to_proto(model)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def test_residuals_have_the_shapes_of_the_skip_connections() -> None:
    assert residual_shapes(CONFIG) == ((2, 1), (2, 1), (2, 2), (3, 2), (3, 2))
    assert NAMES == ("down_residual.0", "down_residual.1", "down_residual.2", "down_residual.3", "mid_residual")
    sdxl = residual_shapes({"block_out_channels": (320, 640, 1280), "layers_per_block": 2})
    assert len(sdxl) == 10
    assert [channels * 128**2 // divisor**2 for channels, divisor in sdxl][:4] == [5242880] * 3 + [1310720]


def test_the_last_skip_connection_is_used_first() -> None:
    model = _unet()
    add_residuals(model, "unet", CONFIG, "unet")
    shapes = {value.name: [str(dim) for dim in value.shape or ()] for value in model.graph.inputs}
    assert shapes["down_residual.2"] == ["rows|1", "2", "height/2|1", "width/2|1"]
    assert shapes["mid_residual"] == ["rows|1", "3", "height/2|1", "width/2|1"]
    for value in model.graph.inputs:  # this graph has one channel everywhere
        value.shape = None
    sample = np.zeros((1, 1, 2, 2), np.float32)
    residuals = {name: np.full((1, 1, 1, 1), 10.0 ** (index + 1), np.float32) for index, name in enumerate(NAMES)}
    made = _run(model, sample=sample, **residuals)
    # The sum of what is joined: the middle block's residual, then each skip connection with its own.
    assert [float(made[f"up{place}"][0, 0, 0, 0]) for place in range(4)] == [1e5 + 3 + 1e4, 2 + 1e3, 1 + 1e2, 0 + 1e1]
    assert (made["down"] == 6).all(), "the down blocks take the skip connections as they are"
    unused = _run(model, sample=sample, **{name: np.zeros((1, 1, 1, 1), np.float32) for name in NAMES})
    plain = _run(_unet(), sample=sample)
    assert all(np.array_equal(unused[name], plain[name]) for name in plain)


def test_another_number_of_skip_connections_is_refused() -> None:
    with pytest.raises(SourceError, match="my-unet: the UNet joins 4 skip connections, 6 expected by its config"):
        add_residuals(_unet(), "unet", CONFIG | {"layers_per_block": 2}, "my-unet")


def test_a_controlnet_adds_an_earlier_one_s_residuals_to_its_outputs() -> None:
    sample = helper.make_tensor_value_info("sample", FLOAT, ["rows", 1, "height", "width"])
    outputs = [helper.make_tensor_value_info(name, FLOAT, ["rows", 1, "height", "width"]) for name in NAMES]
    weights = [helper.make_tensor(f"c{index}", FLOAT, [], [float(index)]) for index in range(5)]
    nodes = [helper.make_node("Add", ["sample", f"c{index}"], [name]) for index, name in enumerate(NAMES)]
    graph = helper.make_graph(nodes, "controlnet", [sample], outputs, weights)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    add_residuals(model, "controlnet", CONFIG, "net")
    onnx.checker.check_model(ir.to_proto(model))
    for value in model.graph.inputs:
        value.shape = None
    earlier = {f"earlier_{name}": np.full((1, 1, 1, 1), 10.0 ** (i + 1), np.float32) for i, name in enumerate(NAMES)}
    made = _run(model, sample=np.zeros((2, 1, 2, 2), np.float32), **earlier)
    assert list(made) == list(NAMES)
    for index, name in enumerate(NAMES):
        assert np.array_equal(made[name], np.full((2, 1, 2, 2), index + 10.0 ** (index + 1), np.float32))
