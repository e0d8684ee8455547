"""The Engine protocol on OpenVINO's CPU plugin."""

__all__ = ["OvEngine"]

import contextlib
import mmap
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.adapters import ScaledLora
from sdxl_trt.engines.backends.ov.library import (
    DEVICE,
    ComputePrecision,
    compile_settings,
    exact_products,
    openvino_core,
)
from sdxl_trt.engines.backends.ov.placing import place_weights
from sdxl_trt.engines.backends.patched import Patch, plan_patch
from sdxl_trt.engines.bundle import Bundle, Component, verify_file
from sdxl_trt.engines.engine import (
    Array,
    DeviceArray,
    Value,
    check_inputs,
    fill_optional,
    rows_of,
    with_rows,
)
from sdxl_trt.engines.errors import (
    EngineError,
    IncompatibleError,
    ResourceError,
    SdxlTrtError,
    UsageError,
    explain_os_error,
)

HOME = "openvino"
_HELD_BYTES = 2 << 30
"""Weights of one component that may be compiled for several shapes, in bytes; at least one shape is kept."""
_MOST_SHAPES = 4
# A compiled UNet of 50 M parameters takes 2.8 times its weights in fp32, in either precision.
WEIGHTS_COMPILED = 2.8
_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class OvEngine:
    """One component on OpenVINO, which computes in `precision`.

    OpenVINO receives the graph as bytes and the weights as addresses in a memory map of the one file with the
    manifest's digest: it opens no file itself. A text encoder is compiled on loading, for any number of prompts; other
    graphs are compiled by the first call with new shapes, for exactly these: a step of the 50 M cousin takes a
    third less so. Compiled shapes stay while their weights are small, so that a server of many sizes does not fill the
    memory. With LoRAs, the map is a private copy of the pages that they change; an 8-bit component takes none.
    """

    def __init__(self, bundle: Bundle, name: str, precision: ComputePrecision) -> None:
        self.name = name
        self.precision = precision
        self.component: Component = bundle.manifest.components[name]
        if not bundle.manifest.onnx:
            raise IncompatibleError(f"{bundle.root}: contains only plans, and OpenVINO runs graphs; export the bundle"
                                    " again without --plans-only, or use --provider tensorrt")  # fmt: skip
        if self.component.precision == "fp8":
            raise IncompatibleError(f"{bundle.root}: {name} is fp8, which OpenVINO does not compute in; use --provider"
                                    " ort-cpu, or export it with --int8 or --fp16")  # fmt: skip
        self._bundle = bundle
        self._graph_path = bundle.path(self.component.graph)
        self._weights_path = bundle.path(self.component.weights)
        self._loras: tuple[ScaledLora, ...] = ()
        self._patch: Patch | None = None
        self._graph: bytes | None = None
        self._weights: NDArray[np.uint8] | None = None
        self._model: Any = None
        self._taken: frozenset[str] = frozenset()
        self._requests: dict[_Shapes, Any] = {}
        self._constants: dict[str, Array] = {}

    def adapt(self, loras: Sequence[ScaledLora]) -> None:
        """Set the LoRAs of the next `load`; see Engine.adapt. Other ones than before unload the engine."""
        wanted = tuple(loras)
        if wanted == self._loras:
            return
        if wanted and self.component.eight_bit:
            raise IncompatibleError(
                f"{self.name} is {self.component.precision}, and LoRAs cannot change 8-bit weights on OpenVINO;"
                f" fuse them at export (export-engines --lora FILE --{self.component.precision}), or export with --fp16"
            )
        patch = plan_patch(self._bundle, self.name, wanted) if wanted else None
        self.unload()
        self._loras, self._patch = wanted, patch

    def prefetch(self) -> None:
        """Map the files and check their digests; see Engine.prefetch."""
        if self._graph is not None or self._model is not None:
            return
        verify_file(self._graph_path, self.component.graph)
        verify_file(self._weights_path, self.component.weights)
        try:
            graph = self._graph_path.read_bytes()
            with self._weights_path.open("rb") as file:
                access = mmap.ACCESS_READ if self._patch is None else mmap.ACCESS_COPY
                mapped = mmap.mmap(file.fileno(), 0, access=access)
        except (OSError, ValueError) as exc:
            reason = exc if isinstance(exc, OSError) else OSError(str(exc))
            raise explain_os_error(reason, f"reading component {self.name}") from exc
        if self._patch is not None:
            self._patch.apply(mapped)
        self._weights = np.frombuffer(mapped, np.uint8)
        self._graph = graph

    def load(self) -> None:
        """Read the graph, and compile a text encoder's; see Engine.load."""
        if self._model is not None:
            return
        core = openvino_core()
        if self.component.precision == "int8" and not exact_products():
            raise IncompatibleError(f"{self.name} is int8, and this CPU's 8-bit products overflow in OpenVINO; use"
                                    " --provider ort-cpu, which has exact ones")  # fmt: skip
        self.prefetch()
        graph, weights = self._graph, self._weights
        if graph is None or weights is None:
            raise EngineError(f"{self.name}: load was interrupted; load it again")
        with _explained(f"loading {self.name}"):
            placed = place_weights(graph, self.component.weights.file, weights.ctypes.data, len(weights))
            self._model = core.read_model(placed)
            self._graph = None
            self._check_ports()
            if self.component.kind == "text_encoder":
                self._requests[()] = self._compiled(())

    def _check_ports(self) -> None:
        """Keep which inputs OpenVINO's model has: it drops those that the graph does not use.

        Raises EngineError for inputs or outputs that are not those of the manifest.
        """
        taken, given = ({port.get_any_name() for port in ports} for ports in (self._model.inputs, self._model.outputs))
        known, expected = ({spec.name for spec in specs} for specs in (self.component.inputs, self.component.outputs))
        if not taken <= known or given != expected:
            raise EngineError(f"{self.name}: OpenVINO reads {sorted(taken)} -> {sorted(given)}, but the manifest says"
                              f" {sorted(known)} -> {sorted(expected)}; use --provider ort-cpu")  # fmt: skip
        self._taken = frozenset(taken)

    def reserve(self, nbytes: int) -> None:
        """Do nothing: OpenVINO allocates when it compiles; see Engine.reserve."""

    def bind(self, constants: Mapping[str, Array]) -> None:
        """Keep the inputs of a phase; see Engine.bind."""
        self._constants = fill_optional(self.component, constants) | dict(constants)

    def infer(self, inputs: Mapping[str, Value], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run the graph; see Engine.infer. The first call with new shapes compiles it."""
        names = list(outputs) if outputs is not None else [spec.name for spec in self.component.outputs]
        return self._run(inputs, names)

    def infer_on_device(self, inputs: Mapping[str, Value]) -> dict[str, DeviceArray]:
        """Run the graph; its outputs are arrays in host memory. See Engine.infer_on_device."""
        found = self._run(inputs, [spec.name for spec in self.component.outputs])
        return {name: _held(array) for name, array in found.items()}

    def infer_keeping(
        self, inputs: Mapping[str, Value], kept: Collection[str], outputs: Sequence[str]
    ) -> tuple[dict[str, Array], dict[str, DeviceArray]]:
        """Run as `infer`; return `outputs`, and those in `kept` for an input: their memory is each call's own."""
        found = self._run(inputs, list(dict.fromkeys((*outputs, *kept))))
        return {name: found[name] for name in outputs}, {name: _held(found[name]) for name in kept}

    def unload(self) -> None:
        """Free the compiled graphs, then the weights that they refer to; see Engine.unload."""
        self._requests.clear()
        self._model = None
        self._constants = {}
        self._graph = None
        self._weights = None

    def _run(self, inputs: Mapping[str, Value], names: Sequence[str]) -> dict[str, Array]:
        """Return copies of the outputs `names`: the request uses its memory again."""
        feed = self._feed(inputs)
        with _explained(f"running {self.name}"):
            taken = {name: np.ascontiguousarray(array) for name, array in feed.items() if name in self._taken}
            request = self._request(taken)
            request.infer(taken, share_inputs=True)
            return {name: np.array(request.get_tensor(name).data) for name in names}

    def _feed(self, inputs: Mapping[str, Value]) -> dict[str, Array]:
        """Return every input of the graph: `inputs`, the constants with as many rows, zeros for what may be missing."""
        if self._model is None:
            raise EngineError(f"{self.name}: infer before load; call load() first")
        constants = with_rows(self.component, self._constants, rows_of(self.component, inputs))
        feed: dict[str, Value] = {**constants, **inputs}
        feed = {**fill_optional(self.component, feed), **feed}
        check_inputs(self.component, feed)
        return {name: self._on_host(name, value) for name, value in feed.items()}

    def _on_host(self, name: str, value: Value) -> Array:
        if not isinstance(value, DeviceArray):
            return value
        if value.home != HOME:
            raise UsageError(f"{self.name}: input {name} is on {value.home}, but this engine runs on {HOME};"
                             " run both components with one provider")  # fmt: skip
        held: Array = value.handle
        return held

    def _request(self, feed: Mapping[str, Array]) -> Any:
        """Return the request for the shapes of `feed`, compiled now if there is none."""
        if () in self._requests:
            return self._requests[()]
        shapes = tuple((name, array.shape) for name, array in sorted(feed.items()))
        found = self._requests.pop(shapes, None)
        if found is None:
            size = int(self.component.parameters * 4 * WEIGHTS_COMPILED)
            most = max(1, min(_MOST_SHAPES, _HELD_BYTES // max(size, 1)))
            while len(self._requests) >= most:  # before compiling: two of them may not fit
                del self._requests[next(iter(self._requests))]
            found = self._compiled(shapes)
        self._requests[shapes] = found  # the last is the latest used
        return found

    def _compiled(self, shapes: _Shapes) -> Any:
        """Return a request for the graph with exactly these input shapes; () leaves them open."""
        model = self._model
        if shapes:
            model = model.clone()
            model.reshape({name: list(shape) for name, shape in shapes})
        compiled = openvino_core().compile_model(model, DEVICE, compile_settings(self.precision))
        return compiled.create_infer_request()


def _held(array: Array) -> DeviceArray:
    return DeviceArray(array.shape, array.dtype, array, HOME)


@contextlib.contextmanager
def _explained(doing: str) -> Iterator[None]:
    """Raise the errors of OpenVINO as ours."""
    try:
        yield
    except SdxlTrtError:
        raise
    except Exception as exc:
        text = " ".join(str(exc).split())
        if isinstance(exc, MemoryError) or any(sign in text for sign in ("bad_alloc", "Failed to allocate")):
            raise ResourceError(f"{doing}: out of memory; try --residency swap, a smaller size, or fewer pictures at"
                                " once") from exc  # fmt: skip
        # Its messages begin with the places in its source that they passed.
        raise EngineError(f"{doing}: OpenVINO failed: {text[-300:]}; rerun with --debug for the full message") from exc
