"""The Engine protocol: the interface of a loaded graph, the same for every backend. numpy in, numpy out."""

__all__ = [
    "Array", "DeviceArray", "Engine", "Value", "check_home", "check_inputs", "fill_optional", "numpy_dtype", "rows_of",
    "whole_feed", "with_rows",
]  # fmt: skip

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.adapters import ScaledLora
from sdxl_trt.engines.bundle import Component, DType, TensorSpec, axis_root, axis_size, may_be_one
from sdxl_trt.engines.errors import UsageError

Array = NDArray[Any]

_NUMPY: dict[DType, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "int64": np.int64}


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """An output that stayed on the device of the engine that made it: an input for any engine of the same backend.

    It is valid until that engine's next call or `unload`; one of `infer_keeping` is for longer. `handle` and `home` are
    the backend's own: the memory, and the device that it is on.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    handle: Any
    home: object

    @property
    def ndim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)


Value = Array | DeviceArray
"""An input: in host memory, or on the device."""


class Engine(Protocol):
    """A graph that can be prefetched, loaded, run and unloaded.

    Nothing is read before `prefetch`, and nothing is copied to a device before `load`. Residency policies use only
    the calls below; each may be repeated, and after `unload` the engine can be loaded again.
    """

    component: Component

    def adapt(self, loras: Sequence[ScaledLora]) -> None:
        """Let the weights have the changes of `loras`, in order, from the next `load` on; () takes them all off.

        With the same LoRAs as before it does nothing. Otherwise an engine that cannot change its weights while it is
        loaded is unloaded; one that is not loaded compares the LoRAs, and reads their values on loading. LoRAs without
        an effect on the component are left out by the caller: `adapted`. Raises SourceError for a LoRA of another model
        and IncompatibleError where LoRAs are not supported; the engine is then as before.
        """

    def prefetch(self) -> None:
        """Read what `load` needs into host memory and check its digests; raise CorruptError if one differs.

        For an engine with a plan, `load` and `unload` may be called meanwhile in another thread: `load` takes what has
        arrived, and `unload` ends the reading.
        """

    def load(self) -> None:
        """Make the engine ready to infer; prefetch first if necessary. Raises ResourceError, EngineError."""

    def reserve(self, nbytes: int) -> None:
        """Make `nbytes` of memory for activations available to a loaded engine, as far as it can use them.

        Then its first call cannot run out of them, when it is too late for another policy. Raises ResourceError.
        """

    def bind(self, constants: Mapping[str, Array]) -> None:
        """Set the inputs that stay constant during a phase. They may have more rows than later inputs of `infer`."""

    def infer(self, inputs: Mapping[str, Value], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run on `inputs` and the bound constants, sliced to the same number of rows; return `outputs`.

        By default these are the component's `results`; no other output is copied to the host. Inputs that the graph
        calls optional are zeros if they are missing. The caller owns the returned arrays. Raises UsageError for inputs
        that do not fit the graph.
        """

    def infer_on_device(self, inputs: Mapping[str, Value]) -> dict[str, DeviceArray]:
        """Run as `infer` does, and leave every output on the device; it crosses to the host only as another output.

        Raises what `infer` raises.
        """

    def infer_keeping(
        self, inputs: Mapping[str, Value], kept: Collection[str], outputs: Sequence[str]
    ) -> tuple[dict[str, Array], dict[str, DeviceArray]]:
        """Run as `infer` does; return `outputs` on the host, and those in `kept` on the device.

        What is kept stays valid until the second next call that keeps it, or `unload`: there are two buffers, used in
        turn. Raises what `infer` raises.
        """

    def unload(self) -> None:
        """Free the engine, its bound inputs and the prefetched data."""


def numpy_dtype(spec: TensorSpec) -> type[np.generic]:
    """Return the numpy type of a graph input or output."""
    return _NUMPY[spec.dtype]


def rows_of(component: Component, inputs: Mapping[str, Value]) -> int | None:
    """Return the smallest number of rows of `inputs`, the axis that leads the graph's first input; None without any."""
    leading = component.inputs[0].shape[0]
    led = {spec.name for spec in component.inputs if spec.shape and spec.shape[0] == leading}
    return min((value.shape[0] for name, value in inputs.items() if name in led and value.ndim), default=None)


def with_rows(component: Component, constants: Mapping[str, Array], rows: int | None) -> dict[str, Array]:
    """Return `constants`, those that have a row for each of the graph's cut to `rows`."""
    leading = component.inputs[0].shape[0]
    shapes = {spec.name: spec.shape for spec in component.inputs}
    return {name: array[:rows] if shapes.get(name, (leading,))[:1] == (leading,) else array
            for name, array in constants.items()}  # fmt: skip


def fill_optional(component: Component, given: Collection[str]) -> dict[str, Array]:
    """Return zeros for the optional inputs that are not among `given`, as small as the graph takes them."""
    return {
        spec.name: np.zeros([1 if may_be_one(axis) else axis_size(axis, {}) for axis in spec.shape], numpy_dtype(spec))
        for spec in component.inputs
        if spec.optional and spec.name not in given
    }


def whole_feed(component: Component, constants: Mapping[str, Array], inputs: Mapping[str, Value]) -> dict[str, Value]:
    """Return every input of the graph: `inputs`, the `constants` with as many rows, zeros for what may be missing.

    Raises UsageError unless they match the graph's.
    """
    feed: dict[str, Value] = {**with_rows(component, constants, rows_of(component, inputs)), **inputs}
    feed = {**fill_optional(component, feed), **feed}
    check_inputs(component, feed)
    return feed


def check_home(name: str, feed: Mapping[str, Value], home: str) -> None:
    """Raise UsageError for an input of component `name` on another device than `home`, its engine's."""
    for key, value in feed.items():
        if isinstance(value, DeviceArray) and value.home != home:
            raise UsageError(f"{name}: input {key} is on {value.home}, but this engine runs on {home}; run both"
                             " components with one provider")  # fmt: skip


def check_inputs(component: Component, inputs: Mapping[str, Value]) -> None:
    """Raise UsageError unless `inputs` match the graph's in name, dtype and shape, with one size per axis name."""
    expected = {spec.name: spec for spec in component.inputs}
    if inputs.keys() != expected.keys():
        raise UsageError(f"inputs {sorted(inputs)} given, but the graph takes {sorted(expected)}")
    axes: dict[str, int] = {}
    for name, spec in expected.items():
        array = inputs[name]
        if array.dtype != numpy_dtype(spec):
            raise UsageError(f"input {name}: dtype {array.dtype} given, {spec.dtype} expected; cast it")
        fits = array.ndim == len(spec.shape) and all(
            _fits(size, dim, axes) for size, dim in zip(array.shape, spec.shape, strict=True)
        )
        if not fits:
            known = f" where {axes}" if axes else ""
            raise UsageError(f"input {name}: shape {list(array.shape)} given, {list(spec.shape)}{known} expected")


def _fits(size: int, dim: int | str, axes: dict[str, int]) -> bool:
    """Return whether an axis may have `size`; a named axis that is new gets it."""
    if isinstance(dim, str) and (axis_root(dim) == dim or axis_root(dim) not in axes):
        return size == axes.setdefault(dim, size)
    return size == axis_size(dim, axes) or (size == 1 and may_be_one(dim))
