"""Measure merged upsampling (`export/graph/upsampling.py`) on ONNX Runtime's CPU provider.

``python -m sdxl_trt.benchmarks.upsampling`` times doublings and their convolutions, of the channels in CHANNELS;
with ``--decoder`` a whole decoder of SDXL's structure with random weights, of ``--width`` channels at its first level.
Each graph runs in turns with its merged form, on one thread; printed are medians of process times and of their ratios.
"""

__all__ = ["Timed", "main", "measure"]

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

from sdxl_trt.export.graph import build_model, for_cpu, make_graph, merge_upsampling, simplify, trace_graph

COMMAND = "python -m sdxl_trt.benchmarks.upsampling"
CHANNELS = (64, 128, 256, 512)
_FATAL_ONLY = 4
_OPSET = 23


class Timed(NamedTuple):
    """Seconds of a call as before, the merged form's share of them, and how far its results are apart."""

    seconds: float
    ratio: float
    apart: float


def measure(usual: ir.Model, side: int, rounds: int) -> Timed:
    """Return how `usual`, whose weights have values, compares with its merged form at `side`² latents."""
    merged = usual.clone()
    if not merge_upsampling(merged):
        raise ValueError("the graph has no upsampling to merge: it needs 64 channels")
    sessions = [_session(model) for model in (usual, merged)]
    name, channels = str(usual.graph.inputs[0].name), usual.graph.inputs[0].shape
    shape = (1, int(channels[1]) if channels is not None else 0, side, side)  # type: ignore[arg-type]
    feed = {name: np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
    first, second = (session.run(None, feed)[0] for session in sessions)
    pairs = [[_seconds(session, feed) for session in sessions] for _ in range(rounds)]
    return Timed(
        statistics.median(before for before, _ in pairs),
        statistics.median(after / before for before, after in pairs),
        float(np.abs(first - second).max()),
    )


def _session(model: ir.Model) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, _FATAL_ONLY
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def _seconds(session: Any, feed: dict[str, Any]) -> float:
    started = time.process_time()
    session.run(None, feed)
    return time.process_time() - started


def layer(channels: int) -> ir.Model:
    """Return a doubling and its convolution between activations, as in a decoder."""
    rng = np.random.default_rng(0)
    square: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [1, 1], "dilations": [1, 1]}
    weights = [numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")]
    for name in ("first", "second"):
        values = rng.standard_normal((channels, channels, 3, 3)) / np.sqrt(9 * channels)
        bias = rng.standard_normal(channels).astype(np.float32)
        weights += [numpy_helper.from_array(values.astype(np.float32), f"{name}.weight"),
                    numpy_helper.from_array(bias, f"{name}.bias")]  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "first.weight", "first.bias"], ["a"], **square),
        helper.make_node("Sigmoid", ["a"], ["b"]),
        helper.make_node("Resize", ["b", "", "scales"], ["c"], mode="nearest", nearest_mode="floor",
                         coordinate_transformation_mode="asymmetric"),
        helper.make_node("Conv", ["c", "second.weight", "second.bias"], ["d"], **square),
        helper.make_node("Sigmoid", ["d"], ["y"]),
    ]  # fmt: skip
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", channels, f"{name}.h", f"{name}.w"])
              for name in "xy"]  # fmt: skip
    graph = helper.make_graph(nodes, "layer", values[:1], values[1:], weights)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=10))


def decoder(width: int) -> ir.Model:
    """Return the CPU's graph, not merged, of a decoder of SDXL's structure in fp32 with random weights."""
    levels = [width, 2 * width, 4 * width, 4 * width]
    config = {"block_out_channels": levels, "down_block_types": ["DownEncoderBlock2D"] * 4,
              "up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 4, "layers_per_block": 2}  # fmt: skip
    model = trace_graph(make_graph("vae_decoder", build_model("AutoencoderKL", config, COMMAND)), "fp32", _OPSET)
    simplify(model)
    torch.manual_seed(0)
    for name, value in model.graph.initializers.items():
        if value.const_value is None and value.shape is not None:
            shape = value.shape.numpy()
            values = torch.randn(shape) / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else torch.full(shape, 0.5)
            value.const_value = ir.tensor(values.numpy(), name=name)
    for_cpu(model)
    return model


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each graph; return 1 if a merged form is not equal to the usual one to 1e-4."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--decoder", action="store_true", help="a whole decoder instead of single layers")
    parser.add_argument("--width", type=int, default=128, metavar="N", help="channels of its first level (128: SDXL's)")
    parser.add_argument("--side", type=int, default=32, metavar="N", help="latents along each side (32)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="calls of each form (9)")
    given = parser.parse_args(argv)
    graphs = {f"decoder {given.width}": decoder(given.width)} if given.decoder else {
        f"{channels} channels": layer(channels) for channels in CHANNELS
    }  # fmt: skip
    apart = 0.0
    for name, graph in graphs.items():
        found = measure(graph, given.side, given.rounds)
        apart = max(apart, found.apart)
        sys.stdout.write(f"{name} at {given.side}²: {found.seconds:.4f} s, merged {found.ratio:.3f} of it,"
                         f" apart by {found.apart:.1e}\n")  # fmt: skip
    return int(apart > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
