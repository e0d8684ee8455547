"""The Engine protocol on OpenVINO's CPU plugin."""

__all__ = ["OvEngine"]

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from sdxl_trt.engines.backends.mapped import MappedEngine
from sdxl_trt.engines.backends.ov.library import (
    DEVICE,
    ComputePrecision,
    compile_settings,
    exact_products,
    openvino_core,
)
from sdxl_trt.engines.backends.ov.placing import place_weights
from sdxl_trt.engines.bundle import Bundle
from sdxl_trt.engines.engine import Array, DeviceArray, Value, check_home, fill_optional, whole_feed
from sdxl_trt.engines.errors import EngineError, IncompatibleError, SdxlTrtError

HOME = "openvino"
_HELD_BYTES = 2 << 30
"""Weights of one component that may be compiled for several shapes, in bytes; at least one shape is kept."""
_MOST_SHAPES = 4
# A compiled UNet of 50 M parameters takes 2.8 times its weights in fp32, in either precision.
WEIGHTS_COMPILED = 2.8
_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class OvEngine(MappedEngine):
    """One component on OpenVINO, which computes in `precision`.

    OpenVINO receives the graph as bytes and the weights as addresses in the map, which it needs until `unload`. A text
    encoder is compiled on loading, for any number of prompts; other graphs are compiled by the first call with new
    shapes, for exactly these: a step of the 50 M cousin takes a third less so. Compiled shapes stay while their weights
    are small, so that a server of many sizes does not fill the memory.
    """

    library = "OpenVINO"
    _without_loras = "or export with --fp16"

    def __init__(self, bundle: Bundle, name: str, precision: ComputePrecision) -> None:
        super().__init__(bundle, name)
        self.precision = precision
        if self.component.precision == "fp8":
            raise IncompatibleError(f"{bundle.root}: {name} is fp8, which OpenVINO does not compute in; use --provider"
                                    " ort-cpu, or export it with --int8 or --fp16")  # fmt: skip
        if self.component.precision == "bf16" and precision != "bf16":
            # It computes such a graph about as exactly as in bf16, whatever it is told.
            raise IncompatibleError(f"{bundle.root}: {name} is bf16, which OpenVINO does not compute in {precision};"
                                    " export it again with --fp16 (or --fp32), or on a CPU with bf16 instructions use"
                                    " --compute-precision bf16")  # fmt: skip
        self._model: Any = None
        self._taken: frozenset[str] = frozenset()
        self._requests: dict[_Shapes, Any] = {}
        self._constants: dict[str, Array] = {}

    @property
    def _loaded(self) -> bool:
        return self._model is not None

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
        try:
            with self._explained("loading"):
                self._put_loras()
                address = np.frombuffer(weights, np.uint8).ctypes.data
                self._model = core.read_model(place_weights(graph, self.component.weights.file, address, len(weights)))
                self._graph = None
                self._check_ports()
                if self.component.kind == "text_encoder":
                    self._requests[()] = self._compiled(())
        except BaseException:
            self._forget_graphs()
            raise

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
        return self._run(inputs, list(outputs if outputs is not None else self.component.results))

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
        self._constants = {}
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        self._requests.clear()
        self._model = None
        self._forget_files()

    def _run(self, inputs: Mapping[str, Value], names: Sequence[str]) -> dict[str, Array]:
        """Return copies of the outputs `names`: the request uses its memory again."""
        if self._model is None:
            raise EngineError(f"{self.name}: infer before load; call load() first")
        feed = whole_feed(self.component, self._constants, inputs)
        check_home(self.name, feed, HOME)
        arrays = {name: value.handle if isinstance(value, DeviceArray) else value for name, value in feed.items()}
        with self._explained("running"):
            taken = {name: np.ascontiguousarray(array) for name, array in arrays.items() if name in self._taken}
            request = self._request(taken)
            request.infer(taken, share_inputs=True)
            return {name: np.array(request.get_tensor(name).data) for name in names}

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

    def _explain(self, doing: str, text: str) -> SdxlTrtError:
        return super()._explain(doing, text[-300:])  # its messages begin with the places in its source that they passed


def _held(array: Array) -> DeviceArray:
    return DeviceArray(array.shape, array.dtype, array, HOME)
