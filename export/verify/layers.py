"""Every 8-bit layer as it is stored, against the checkpoint's weight and the measured range of its input.

Rounding in some hundred layers can hide a fault in one of them, such as a zero point that is off by one, from any
comparison of results. So each layer is looked at by itself. Its weight must be within half a step of the
checkpoint's, and its quantizers must span the measured ranges to within a step.
"""

__all__ = ["check_layers"]

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sdxl_trt.engines import CorruptError
from sdxl_trt.engines.bundle import WEIGHT, Component
from sdxl_trt.export.components import ComponentPlan
from sdxl_trt.export.eight_bit import INPUT, OUTPUT, Quantizer, Ranges, StoredLayer, stored_layers

Numbers = NDArray[np.float64]
_BIAS = ".bias"
_LARGEST = {"int8": 127.0, "fp8": 448.0}
# Scales are rounded up to fp16, the smallest to multiples of 2**-24, and bf16 or fp32 weights to fp16 first.
_HALF, _ROUNDED, _LEAST = 0.51, 1.04, 2.0**-20
# Half of the distance of two FP8 numbers: relative above the smallest normal one, 2**-6, and constant below.
_FP8_RELATIVE, _FP8_CONSTANT = 1.02 * 2.0**-4, 1.02 * 2.0**-10
_FP16 = 2.0**-11
# A zero point is rounded to a whole step, which moves both ends by half of one.
_STEPS = 0.75
_SHOWN = 3


def check_layers(root: Path, component: Component, plan: ComponentPlan, ranges: Ranges) -> list[str]:
    """Return one line for each graph with layers that do not match the checkpoint or the ranges.

    One weight is in memory at a time, in double precision.
    """
    wrong: dict[str, list[str]] = defaultdict(list)
    layers: dict[str, list[tuple[str, StoredLayer]]] = defaultdict(list)
    for record in (component.graph, component.cpu_graph, component.slot_graph):
        if record is None:
            continue
        path = root / record.file
        try:
            found = list(stored_layers(ir.load(path), path.parent))
        except CorruptError as exc:
            wrong[record.file].append(str(exc))
            continue
        count = len({layer.module for layer in found})
        recorded = 0 if component.quantization is None else (
            component.quantization.linears + component.quantization.convolutions
        )  # fmt: skip
        if count != recorded:
            wrong[record.file].append(f"{count} layers compute in 8 bits, and {recorded} are recorded")
        for layer in found:
            layers[layer.module].append((record.file, layer))
    for module, exact, bias in _checkpoint(plan, layers):
        for file, layer in layers[module]:
            wrong[file] += [f"{module}: {problem}" for problem in _problems(layer, exact, bias, ranges, plan.precision)]
    return [f"{file}: {'; '.join(each[:_SHOWN])}{_more(each)}; export again, and report it if it fails again"
            for file, each in wrong.items() if each]  # fmt: skip


def _more(problems: list[str]) -> str:
    return f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""


def _checkpoint(
    plan: ComponentPlan, modules: dict[str, list[tuple[str, StoredLayer]]]
) -> Iterator[tuple[str, Numbers, Numbers | None]]:
    """Yield the weight and bias of each module in fp32's values and published axes."""
    biases = {name: tensor.float().numpy().astype(np.float64)
              for name, tensor in plan.checkpoint.read([module + _BIAS for module in modules
                                                        if module + _BIAS in plan.model.state])}  # fmt: skip
    order = plan.checkpoint.in_file_order({module + WEIGHT: module for module in modules})
    for name, tensor in plan.checkpoint.read(order):
        module = name.removesuffix(WEIGHT)
        exact = tensor.float().numpy().astype(np.float64).reshape(plan.model.state[name])
        yield module, exact, biases.get(module + _BIAS)


def _problems(
    layer: StoredLayer, exact: Numbers, bias: Numbers | None, ranges: Ranges, precision: str
) -> Iterator[str]:
    """Yield what is wrong with a layer."""
    weight, scale = layer.weight()
    if layer.node.op_type != "Conv" and layer.axis == 1:
        exact = exact.T  # stored as a matrix product reads it
    if layer.half is not None:
        exact = np.split(exact, 2, axis=layer.axis)[layer.half]
    if weight.shape != exact.shape:
        yield f"its weight has the shape {weight.shape}, and the checkpoint's {exact.shape}"
        return
    yield from _weight_problems(weight, exact, layer.axis, precision)
    yield from _span_problems("input", layer.source, ranges.of(layer.module + INPUT))
    if layer.result is not None:
        yield from _span_problems("result", layer.result, ranges.of(layer.module + OUTPUT))
    stored = layer.bias()
    if stored is not None and bias is not None:
        value, step = stored
        if not np.allclose(step, layer.source.step * scale, rtol=1e-3, atol=0):
            yield "its bias is not in units of its input's scale times its weight's"
        if (np.abs(value - bias) > _HALF * step + _FP16 * np.abs(bias)).any():
            yield "its bias is not the checkpoint's"


def _weight_problems(weight: Numbers, exact: Numbers, axis: int, precision: str) -> Iterator[str]:
    other = tuple(each for each in range(exact.ndim) if each != axis)
    largest = np.abs(exact).max(axis=other, keepdims=True)
    scale = np.maximum(_ROUNDED * largest / _LARGEST[precision], 2 * _LEAST)
    allowed = _HALF * scale if precision == "int8" else (
        np.maximum(_FP8_RELATIVE * np.abs(exact), _FP8_CONSTANT * scale)
    )  # fmt: skip
    off = np.abs(weight - exact) - _FP16 * np.abs(exact)
    if (off > allowed).any():
        ratio = float(np.abs(weight).sum() / max(np.abs(exact).sum(), np.finfo(np.float64).tiny))
        yield (f"its weight is further from the checkpoint's than rounding explains, in {int((off > allowed).sum())} of"
               f" {off.size} numbers (mean size {ratio:.3f} of the checkpoint's)")  # fmt: skip


def _span_problems(what: str, found: Quantizer, span: tuple[float, float]) -> Iterator[str]:
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    if found.low == -found.high:  # symmetric
        high = max(-low, high)
        low = -high
    margin = _STEPS * found.step + 2 * _LEAST * max(abs(found.low), abs(found.high)) / found.step
    if abs(found.low - low) > margin or abs(found.high - high) > margin:
        yield (f"its {what} was measured from {span[0]:.4g} to {span[1]:.4g}, and is rounded to {found.low:.4g} to"
               f" {found.high:.4g}")  # fmt: skip
