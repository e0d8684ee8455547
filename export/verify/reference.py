"""A component in PyTorch, filled from its checkpoint: the reference for its graph."""

__all__ = ["load_reference", "run_reference"]

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch.overrides import TorchFunctionMode

from sdxl_trt.engines import Array
from sdxl_trt.export.components import ComponentPlan
from sdxl_trt.export.graph import Graph, MetaModel, build_model, make_graph, published_name


def load_reference(plan: ComponentPlan) -> Graph:
    """Return the graph of `plan` over a new module that holds the checkpoint's tensors in fp32.

    Of an autoencoder only this half is filled; the other stays on the meta device. Tensors are read one at a time;
    those stored in fp32 stay mapped from the file.
    """
    where = plan.source.where
    model = build_model(plan.source.class_name, plan.source.config, where)
    _fill(model, plan)
    return make_graph(plan.kind, model, time_ids=plan.time_ids, pooled=plan.pooled, tokens=plan.tokens, where=where)


def run_reference(graph: Graph, inputs: Mapping[str, Array], dtype: torch.dtype) -> dict[str, Array]:
    """Return {output: float32 array} of the module; `inputs`, float32 and int64, are cast to the graph's dtypes."""
    arguments = [_tensor(inputs[spec.name], spec.dtype or dtype) for spec in graph.inputs]
    products: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if dtype is not torch.float32:
        products = _WideProducts()
    with torch.inference_mode(), products:
        result = graph.module(*arguments)
    results = result if isinstance(result, tuple) else (result,)
    return {spec.name: value.float().numpy() for spec, value in zip(graph.outputs, results, strict=True)}


def _fill(model: MetaModel, plan: ComponentPlan) -> None:
    inner = {published_name(name, plan.source.class_name): name for name in model.module.state_dict()}
    for name, tensor in plan.checkpoint.read(plan.tensor_names()):
        value = tensor.reshape(model.state[name])
        set_module_tensor_to_device(
            model.module, inner[name], "cpu", value=value, dtype=torch.float32, clear_cache=False
        )
    for name, buffer in model.buffers.items():
        set_module_tensor_to_device(model.module, name, "cpu", value=buffer, clear_cache=False)


def _tensor(array: Array, dtype: torch.dtype) -> torch.Tensor:
    # A recorded array may be a read-only view, and torch warns of those.
    return torch.from_numpy(array.copy()).to(dtype)


class _WideProducts(TorchFunctionMode):
    """Makes half-precision convolutions and linear layers accumulate in fp32 and round once.

    Tensor cores and ONNX Runtime do the same. On a CPU without fp16 arithmetic, PyTorch's convolution would take a
    hundred times as long and round more often.
    """

    _WIDE = (torch.conv2d, torch.nn.functional.linear)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func not in self._WIDE:
            return func(*args, **named)
        dtype = args[0].dtype
        wide = [value.float() if isinstance(value, torch.Tensor) else value for value in args]
        named = {key: value.float() if isinstance(value, torch.Tensor) else value for key, value in named.items()}
        return func(*wide, **named).to(dtype)
