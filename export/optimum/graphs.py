"""The bundle's graphs with the signatures that optimum-onnx expects: a few nodes around the same weights.

optimum's ``modeling_diffusion.py`` needs a scalar ``timestep``; text encoders that take ``input_ids`` alone; from the
second encoder ``text_embeds`` as the first output, since diffusers takes a two-dimensional output 0 as the pooled
prompt; and dynamic output dimensions as expressions with spaces (``8 * height``), which it evaluates to allocate its
buffers.
"""

__all__ = ["wrap"]

import re

import numpy as np
import onnx_ir as ir

from sdxl_trt.engines import CorruptError
from sdxl_trt.engines.bundle import DEEP_FEATURE

_OPERATOR = re.compile(r"\s*([*/])\s*")


def wrap(model: ir.Model) -> None:
    """Give `model`, any graph of a bundle, optimum's signature, in place. No weight is read or moved.

    Types stay: optimum casts its feeds to the types that a session declares, so ``timestep``, ``text_embeds`` and
    ``time_ids`` remain fp32 in fp16 graphs.
    """
    if any(value.name == "timestep" for value in model.graph.inputs):
        _share_timestep(model.graph)
    _fill_embeddings(model.graph)
    _drop_deep(model.graph)
    _pooled_first(model.graph)
    for value in model.graph.outputs:
        value.shape = _spaced(value)


def _share_timestep(graph: ir.Graph) -> None:
    """Replace the (rows,) timestep input by a scalar that is broadcast to all rows."""
    inputs = {str(value.name): value for value in graph.inputs}
    per_row = inputs["timestep"]
    if per_row.shape is None or per_row.shape.rank() != 1:
        raise CorruptError("the UNet's timestep input is not of shape (rows,); run export-engines again")
    scalar = ir.val("timestep", ir.DataType.FLOAT, ())
    rows = ir.node("Shape", [inputs["sample"]], {"start": 0, "end": 1})
    expanded = ir.node("Expand", [scalar, rows.outputs[0]])
    rows.outputs[0].name, expanded.outputs[0].name = "optimum.rows", "optimum.timestep"
    graph.inputs[graph.inputs.index(per_row)] = scalar
    ir.convenience.replace_all_uses_with(per_row, expanded.outputs[0])
    graph.insert_before(graph[0], [rows, expanded])


def _fill_embeddings(graph: ir.Graph) -> None:
    """Replace a text encoder's inputs for textual inversion embeddings: no token of any prompt has one."""
    inputs = {str(value.name): value for value in graph.inputs}
    if "embeddings" not in inputs:
        return
    index, vectors, ids = inputs["embedding_index"], inputs["embeddings"], inputs["input_ids"]
    width = None if vectors.shape is None else vectors.shape[1]
    if vectors.dtype is None or not isinstance(width, int):
        raise CorruptError("the text encoder's embeddings have no type; run export-engines again")
    # The index keeps the shape of the ids, from which the graph may take the number of prompts.
    zeros = ir.node("Sub", [ids, ids])
    zeros.outputs[0].name = "optimum.embedding_index"
    row = ir.tensor(np.zeros((1, width), vectors.dtype.numpy()), name="optimum.embeddings")
    constant = ir.Value(name="optimum.embeddings", const_value=row)
    for value, filled in ((index, zeros.outputs[0]), (vectors, constant)):
        graph.inputs.remove(value)
        ir.convenience.replace_all_uses_with(value, filled)
    graph.register_initializer(constant)
    graph.insert_before(graph[0], zeros)


def _drop_deep(graph: ir.Graph) -> None:
    """Let a UNet return its prediction alone."""
    for value in [value for value in graph.outputs if value.name == DEEP_FEATURE]:
        graph.outputs.remove(value)


def _pooled_first(graph: ir.Graph) -> None:
    outputs = list(graph.outputs)
    outputs.sort(key=lambda value: value.name != "text_embeds")
    graph.outputs.clear()
    graph.outputs.extend(outputs)


def _spaced(value: ir.Value) -> ir.Shape:
    if value.shape is None:
        raise CorruptError(f"the output {value.name} has no shape; run export-engines again")
    return ir.Shape([dim if isinstance(dim, int) else _OPERATOR.sub(r" \1 ", str(dim.value)) for dim in value.shape])
