"""The Engine protocol: the interface of a loaded graph, the same for every backend. numpy in, numpy out."""

__all__ = ["Array", "Engine", "check_inputs", "numpy_dtype"]

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.adapters import ScaledLora
from sdxl_trt.engines.bundle import Component, DType, TensorSpec
from sdxl_trt.engines.errors import UsageError

Array = NDArray[Any]

_NUMPY: dict[DType, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "int64": np.int64}


class Engine(Protocol):
    """A graph that can be prefetched, loaded, run and unloaded.

    Nothing is read before `prefetch`, and nothing is copied to a device before `load`. Residency policies use only
    these seven calls; each may be repeated, and after `unload` the engine can be loaded again.
    """

    component: Component

    def adapt(self, loras: Sequence[ScaledLora]) -> None:
        """Let the weights have the changes of `loras`, in order, from the next `load` on; () takes them all off.

        With the same LoRAs as before it does nothing. Otherwise an engine that cannot change its weights while it is
        loaded is unloaded. LoRAs without an effect on the component are left out by the caller: `adapted`. Raises
        SourceError for a LoRA of another model and IncompatibleError where LoRAs are not supported; the engine is then
        as before.
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

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run on `inputs` and the bound constants, sliced to the same number of rows; return `outputs` (default: all).

        The caller owns the returned arrays. Raises UsageError for inputs that do not fit the graph.
        """

    def unload(self) -> None:
        """Free the engine, its bound inputs and the prefetched data."""


def numpy_dtype(spec: TensorSpec) -> type[np.generic]:
    """Return the numpy type of a graph input or output."""
    return _NUMPY[spec.dtype]


def check_inputs(component: Component, inputs: Mapping[str, Array]) -> None:
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
            size == (dim if isinstance(dim, int) else axes.setdefault(dim, size))
            for size, dim in zip(array.shape, spec.shape, strict=True)
        )
        if not fits:
            known = f" where {axes}" if axes else ""
            raise UsageError(f"input {name}: shape {list(array.shape)} given, {list(spec.shape)}{known} expected")
