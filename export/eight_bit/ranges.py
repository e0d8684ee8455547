"""The ranges of the activations that 8-bit layers read and write, measured while the model runs.

A graph gains two outputs per measured value, its smallest and its largest number, so that no activation leaves the
run. Ranges have the names of the layers' tensors, which are the same in a component's graphs: ``<module>.input``,
``<module>.output`` of convolutions, and ``<module>.q``, ``.k`` and ``.v`` of attentions.
"""

__all__ = ["INPUT", "OUTPUT", "RangeOutputs", "Ranges", "add_range_outputs"]

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from sdxl_trt.engines import Array, CorruptError
from sdxl_trt.export.eight_bit.layers import find_attentions, find_layers

INPUT, OUTPUT = ".input", ".output"


@dataclass
class Ranges:
    """The smallest and the largest number of each measured value of a component."""

    component: str
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)

    def include(self, name: str, low: float, high: float) -> None:
        """Widen the range of a value. Raises CorruptError for NaN and infinity.

        The outputs below show infinity only: ONNX Runtime's ReduceMin and ReduceMax ignore NaN.
        """
        if not (np.isfinite(low) and np.isfinite(high) and low <= high):
            raise CorruptError(f"{self.component}: {name} holds NaN or infinity while the ranges are measured; the"
                               " checkpoint or the prompts are damaged")  # fmt: skip
        known = self.spans.get(name, (low, high))
        self.spans[name] = (min(known[0], low), max(known[1], high))

    def of(self, name: str) -> tuple[float, float]:
        """Return the smallest and the largest number of a value."""
        if name not in self.spans:
            raise CorruptError(f"{self.component}: the calibration has no range of {name}; it belongs to another model,"
                               " so measure anew: export with --calibration PROMPTS")  # fmt: skip
        return self.spans[name]

    def digest(self) -> str:
        """Return the sha256 of the ranges, which does not depend on the order in which they were measured."""
        return hashlib.sha256(json.dumps(sorted(self.spans.items())).encode()).hexdigest()


@dataclass(frozen=True)
class RangeOutputs:
    """The outputs of a graph that state ranges: {measured value: (its smallest, its largest)}, as names of outputs."""

    outputs: Mapping[str, tuple[str, str]]

    @property
    def names(self) -> list[str]:
        """Return the names of the outputs, each once."""
        return list(dict.fromkeys(name for pair in self.outputs.values() for name in pair))

    def record(self, found: Mapping[str, Array], ranges: Ranges) -> None:
        """Add the outputs of one run to `ranges`."""
        for name, (low, high) in self.outputs.items():
            ranges.include(name, float(found[low]), float(found[high]))


def add_range_outputs(model: ir.Model) -> RangeOutputs:
    """Add the smallest and largest number of every measured value to the outputs of `model`, in place."""
    values: dict[str, ir.Value] = {}
    for layer in find_layers(model):
        values[layer.module + INPUT] = layer.source
        if layer.kind == "convolution":
            values[layer.module + OUTPUT] = layer.result
    for attention in find_attentions(model):
        values |= {f"{attention.module}.{name}": value for name, value in attention.sources.items()}
    known: dict[ir.Value, tuple[str, str]] = {}
    for name, value in values.items():
        if value not in known:
            known[value] = _add_extremes(model.graph, value, f"range.{name}")
    return RangeOutputs({name: known[value] for name, value in values.items()})


def _add_extremes(graph: ir.Graph, value: ir.Value, name: str) -> tuple[str, str]:
    found = []
    for operator in ("ReduceMin", "ReduceMax"):
        node = ir.node(operator, [value], {"keepdims": 0}, name=f"{name}.{operator}")
        node.outputs[0].name = f"{name}.{operator}"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        graph.append(node)
        graph.outputs.append(node.outputs[0])
        found.append(f"{name}.{operator}")
    return found[0], found[1]
