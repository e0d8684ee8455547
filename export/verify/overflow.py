"""Which activations of a module overflow fp16, found while it runs in fp32.

Random inputs never overflow, and an fp16 run hides where an overflow begins, so the fp32 run on real inputs is
watched: every module's outputs, and the inputs of the innermost modules, which show the sums and products between
modules. Values inside a single operator (attention scores) are not seen.
"""

__all__ = ["FP16_MAX", "NEAR_MISS", "Peak", "overflows", "watch_dtypes", "watch_peaks"]

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import torch

FP16_MAX = 65504.0
NEAR_MISS = 32768.0
_INPUT = " (input)"
Visit = Callable[[str, torch.Tensor], None]


class Peak(msgspec.Struct, frozen=True):
    """The largest absolute output of a module, or its largest input if the name ends in "(input)"."""

    module: str
    value: float


@contextlib.contextmanager
def watch_peaks(module: torch.nn.Module) -> Iterator[dict[str, float]]:
    """Yield {module: largest absolute activation}, which fills in the order of execution."""
    peaks: dict[str, float] = {}

    def note(name: str, tensor: torch.Tensor) -> None:
        low, high = tensor.detach().aminmax()
        largest = max(-float(low), float(high))
        # NaN fails every comparison, so it is recorded as the infinity that it came from.
        peaks[name] = max(peaks.get(name, 0.0), largest if largest == largest else float("inf"))  # noqa: PLR0124

    with _hooks(module, note):
        yield peaks


@contextlib.contextmanager
def watch_dtypes(module: torch.nn.Module) -> Iterator[dict[str, torch.dtype]]:
    """Yield {module: dtype of its activations}, which fills as the module runs; fp16 wins over other dtypes."""
    dtypes: dict[str, torch.dtype] = {}

    def note(name: str, tensor: torch.Tensor) -> None:
        if dtypes.get(name) is not torch.float16:
            dtypes[name] = tensor.dtype

    with _hooks(module, note):
        yield dtypes


def overflows(peaks: Mapping[str, float], dtypes: Mapping[str, torch.dtype], limit: float = FP16_MAX) -> list[Peak]:
    """Return, in the order of execution, the peaks above `limit` of modules that run in fp16.

    `dtypes` come from the run at the export's precision: activations that stay in fp32 or bf16 cannot overflow.
    """
    return [
        Peak(name, value)
        for name, value in peaks.items()
        if value > limit and dtypes.get(name, torch.float16) is torch.float16
    ]


@contextlib.contextmanager
def _hooks(module: torch.nn.Module, visit: Visit) -> Iterator[None]:
    handles = []
    for name, inner in module.named_modules():
        if not name:
            continue
        handles.append(inner.register_forward_hook(_after(name, visit)))
        if not any(True for _ in inner.children()):
            handles.append(inner.register_forward_pre_hook(_before(name + _INPUT, visit), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _after(name: str, visit: Visit) -> Callable[[Any, Any, Any], None]:
    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        for tensor in _tensors(output):
            visit(name, tensor)

    return hook


def _before(name: str, visit: Visit) -> Callable[[Any, Any, Any], None]:
    def hook(_module: Any, inputs: Any, named: Any) -> None:
        for tensor in _tensors((inputs, named)):
            visit(name, tensor)

    return hook


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors in a module's inputs or outputs: tuples, mappings and output classes."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel():
            yield value
        return
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    else:
        parts = list(value) if isinstance(value, list | tuple) else []
    for part in parts:
        yield from _tensors(part)
