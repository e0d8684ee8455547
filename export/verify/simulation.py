"""An 8-bit component in PyTorch: its linear layers and convolutions round as the exported graph should.

It is made of the checkpoint and the measured ranges alone. A fault in a graph, such as a scale that belongs to another
layer, is therefore seen as a difference from it.
"""

__all__ = ["simulated"]

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sdxl_trt.engines import CorruptError
from sdxl_trt.engines.bundle import Quantization
from sdxl_trt.export.components import ComponentPlan
from sdxl_trt.export.eight_bit import (
    FORMATS,
    INPUT,
    OUTPUT,
    Ranges,
    Scheme,
    activation_scale,
    quantize_weight,
    unsigned_scale,
)
from sdxl_trt.export.graph import Graph, published_name

_SOFTMAX = (0.0, 1.0)


@contextlib.contextmanager
def simulated(
    graph: Graph, plan: ComponentPlan, quantization: Quantization, ranges: Ranges, *, cpu: bool
) -> Iterator[None]:
    """Have the module of `graph`, in fp32, compute as the component's graph for a CPU, or for other devices.

    Raises CorruptError if the record counts other layers in 8 bits than the module has.
    """
    scheme: Scheme = "fp8" if plan.precision == "fp8" else "int8"
    unsigned = cpu and scheme == "int8"
    layers = dict(_layers(graph, plan, quantization))
    if len(layers) != quantization.linears + quantization.convolutions:
        count = quantization.linears + quantization.convolutions
        raise CorruptError(f"{plan.source.where}: {count} layers are recorded in 8 bits, and {len(layers)} of the model"
                           " are not excluded; export again")  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            _narrow(layer, name, ranges, scheme, stack, unsigned=unsigned)
        if quantization.attentions:
            stack.enter_context(_Attentions(graph, plan, quantization, ranges, stack))
        yield


def _layers(graph: Graph, plan: ComponentPlan, quantization: Quantization) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers in 8 bits by their published names."""
    used = set(plan.tensor_names())
    for name, module in _modules(graph, plan):
        known = f"{name}.weight" in used and name not in quantization.excluded
        if known and isinstance(module, (nn.Linear, nn.Conv2d)):
            yield name, module


def _modules(graph: Graph, plan: ComponentPlan) -> Iterator[tuple[str, nn.Module]]:
    for name, module in graph.module.model.named_modules():
        yield published_name(name, plan.source.class_name), module


def _narrow(
    layer: Any, name: str, ranges: Ranges, scheme: Scheme, stack: contextlib.ExitStack, *, unsigned: bool
) -> None:
    """Round a layer's weight, and what it reads and, for a convolution on a CPU, returns."""
    span = ranges.of(name + INPUT)
    convolution = isinstance(layer, nn.Conv2d)
    exact = layer.weight.data
    bias = None if layer.bias is None or not convolution else layer.bias.data.float().numpy()
    near = float(unsigned_scale(span)[0])
    narrow, scales = quantize_weight(exact, 0, scheme, bias, near)
    shape = [-1, *([1] * (exact.dim() - 1))]
    layer.weight.data = narrow.float() * torch.from_numpy(scales).reshape(shape)
    stack.callback(_restore, layer, exact)
    through = _through(span, scheme, unsigned=unsigned)
    hook = layer.register_forward_pre_hook(lambda _, inputs: (through(inputs[0]), *inputs[1:]))
    stack.callback(hook.remove)
    if convolution and unsigned:
        after = _through(ranges.of(name + OUTPUT), scheme, unsigned=True)
        stack.callback(layer.register_forward_hook(lambda _, __, result: after(result)).remove)


def _restore(layer: Any, weight: Tensor) -> None:
    layer.weight.data = weight


def _through(span: tuple[float, float], scheme: Scheme, *, unsigned: bool = False) -> Callable[[Tensor], Tensor]:
    """Return a function that rounds numbers as a quantizer for `span` does."""
    if unsigned:
        step, zero = unsigned_scale(span)
        return lambda x: ((x / float(step)).round() + zero).clamp(0, 255).sub(zero) * float(step)
    scale, form = float(activation_scale(span, scheme)), FORMATS[scheme]

    def rounded(x: Tensor) -> Tensor:
        scaled = (x / scale).clamp(-form.largest, form.largest)
        return (scaled.round() if scheme == "int8" else scaled.to(form.torch).float()) * scale

    return rounded


class _Attentions(TorchFunctionMode):
    """Computes attention as FP8 graphs do, as two products of rounded numbers, if its queries' layer is in 8 bits."""

    def __init__(
        self, graph: Graph, plan: ComponentPlan, quantization: Quantization, ranges: Ranges, stack: contextlib.ExitStack
    ) -> None:
        super().__init__()
        self._ranges, self._name = ranges, ""
        """The attention that runs, "" for one in floating point."""
        for name, module in _modules(graph, plan):
            if f"{name}.q" in ranges.spans:
                narrow = "" if f"{name}.to_q" in quantization.excluded else name
                hook = module.register_forward_pre_hook(lambda *_, name=narrow: self._enter(name))
                stack.callback(hook.remove)

    def _enter(self, name: str) -> None:
        self._name = name

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is not torch.nn.functional.scaled_dot_product_attention or not self._name:
            return func(*args, **given)
        query, key, value = (*args, *(given[name] for name in ("query", "key", "value") if name in given))[:3]
        factor = given.get("scale") or query.shape[-1] ** -0.5
        low, high = self._ranges.of(f"{self._name}.q")
        query = _through((low * factor, high * factor), "fp8")(query * factor)
        key = _through(self._ranges.of(f"{self._name}.k"), "fp8")(key)
        value = _through(self._ranges.of(f"{self._name}.v"), "fp8")(value)
        shares = torch.softmax(query @ key.transpose(-1, -2), dim=-1)
        return _through(_SOFTMAX, "fp8")(shares) @ value
