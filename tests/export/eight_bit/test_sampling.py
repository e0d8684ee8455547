"""Samples of layers' inputs, and each layer's own error, against a computation of their own."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from sdxl_trt.export.eight_bit.layers import find_layers
from sdxl_trt.export.eight_bit.sampling import LayerError, add_sample_outputs, layer_error, worst_first
from sdxl_trt.export.quantize.session import GraphSession

SPAN = (-2.0, 3.0)


def _layer(kind: str, axis: int, **attributes: Any) -> Any:
    node = ir.node("Conv" if kind == "convolution" else "MatMul", [], attributes)
    return SimpleNamespace(module="one", kind=kind, axis=axis, node=node)


def _narrow_weight(weight: Any, scheme: str) -> Any:
    """Return a weight (out, ...) through 8 bits with a scale per row, as a textbook does it."""
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    largest = 127 if scheme == "int8" else 448
    scale = np.abs(rows).max(axis=1, keepdims=True) / largest
    near = scale.astype(np.float16).astype(np.float64)
    scale = np.where(near < scale, np.nextafter(scale.astype(np.float16), np.float16(np.inf)), near).astype(np.float64)
    narrow = np.rint(rows / scale) if scheme == "int8" else (rows / scale).astype(ml_dtypes.float8_e4m3fn).astype(float)
    return (narrow * scale).reshape(weight.shape)


def _narrow_input(source: Any, scheme: str) -> Any:
    low, high = SPAN
    if scheme == "fp8":
        scale = float(np.float16(3.0 / 448))
        scale = scale if scale >= 3.0 / 448 else float(np.nextafter(np.float16(scale), np.float16(1)))
        return np.clip(source / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(float) * scale
    scale = (high - low) / 255
    zero = round(-low / scale)
    return (np.clip(np.rint(source / scale) + zero, 0, 255) - zero) * scale


def _snr(exact: Any, found: Any) -> float:
    return float(10 * np.log10(np.square(exact).sum() / np.square(found - exact).sum()))


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_error_of_a_linear_layer(scheme: Any, axis: int, rng: np.random.Generator) -> None:
    weight, source = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 24), (64, 24)))
    stored = torch.from_numpy(weight if axis == 0 else weight.T.copy())
    error = layer_error(_layer("linear", axis), source, stored, SPAN, scheme, "why")
    expected = _snr(source @ weight.T, _narrow_input(source, scheme) @ _narrow_weight(weight, scheme).T)
    assert error.snr_db == pytest.approx(expected, abs=0.05)
    assert (error.module, error.kind, error.parameters, error.excluded) == ("one", "linear", weight.size, "why")
    assert (error.low, error.high) == SPAN


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize(("stride", "pad"), [(1, 1), (2, 1), (1, 0)])
def test_the_error_of_a_convolution(scheme: Any, stride: int, pad: int, rng: np.random.Generator) -> None:
    weight, source = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 4, 3, 3), (1, 4, 10, 10)))
    layer = _layer("convolution", 0, strides=[stride] * 2, pads=[pad] * 4)

    def convolve(x: Any, kernel: Any) -> Any:
        x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
        return np.einsum("nchwij,ocij->nohw", windows, kernel)

    error = layer_error(layer, source, torch.from_numpy(weight), SPAN, scheme)
    found = convolve(_narrow_input(source, scheme), _narrow_weight(weight, scheme))
    assert error.snr_db == pytest.approx(_snr(convolve(source, weight), found), abs=0.05)


def test_a_layer_without_error_and_one_without_signal_are_judged() -> None:
    nothing = np.zeros((4, 3), np.float32)
    weight = torch.zeros(3, 3)
    assert layer_error(_layer("linear", 1), nothing, weight, SPAN, "int8").snr_db == 200


def test_the_worst_layer_comes_first() -> None:
    errors = [LayerError(module=str(snr), kind="linear", snr_db=snr, low=0, high=1, parameters=1) for snr in (3, 1, 2)]
    assert [each.snr_db for each in worst_first(errors)] == [1, 2, 3]


def test_samples_are_rows_and_squares_of_what_the_layers_read(
    pairs: Callable[[str], Any], unet_inputs: Callable[[Any], Any]
) -> None:
    folder = pairs("outline").bundle / "unet"
    sampled, whole = (ir.load(folder / "model.onnx") for _ in range(2))
    names = add_sample_outputs(sampled, find_layers(sampled))
    layers = {layer.module: layer for layer in find_layers(whole)}
    assert names.keys() == layers.keys()
    chosen = ["conv_in", "down_blocks.0.downsamplers.0.conv", "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
              "time_embedding.linear_1", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"]  # fmt: skip
    sources = {module: layers[module].source for module in chosen}
    for value in sources.values():
        if not value.is_graph_input():
            value.type = ir.TensorType(ir.DataType.FLOAT)
            whole.graph.outputs.append(value)
    inputs = unet_inputs(0)
    with GraphSession(sampled, folder) as one, GraphSession(whole, folder) as other:
        found = one.run(inputs, [names[module] for module in chosen])
        wanted = [str(value.name) for value in sources.values() if not value.is_graph_input()]
        values = inputs | other.run(inputs, wanted)
    for module, source in sources.items():
        sample, value = found[names[module]], values[str(source.name)]
        if layers[module].kind == "linear":
            rows = value.reshape(-1, value.shape[-1])
            expected = rows[np.arange(64) * len(rows) // 64]
        else:
            top = max(value.shape[2] // 2 - 5, 0)
            expected = value[:1, :, top : top + 10, top : top + 10]
        assert np.allclose(sample, expected, rtol=1e-4, atol=1e-5), module
