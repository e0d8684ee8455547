"""Execution contexts, one for each set of input shapes, and the CUDA graphs that are captured of them.

TensorRT's guide advises one context a captured graph, with activation memory shared: a graph holds the shapes,
the profile and every address that it was captured with, so nothing of them is ever changed behind its back.
"""

__all__ = ["MAX_SHAPES", "ShapedContext", "ShapedContexts"]

from collections.abc import Callable, Mapping
from typing import Any

from sdxl_trt.engines.backends.cuda import DeviceBuffer, Graph
from sdxl_trt.engines.backends.trt.device import TrtDevice
from sdxl_trt.engines.errors import EngineError
from sdxl_trt.engines.plans import Shapes

MAX_SHAPES = 4
"""Contexts that an engine keeps: guidance on and off, at two sizes."""


class ShapedContext:
    """A context whose profile and input shapes are set once; the caller holds the device's lock in every call."""

    def __init__(self, device: TrtDevice, context: Any, name: str, profile: int, shapes: Shapes) -> None:
        self.context = context
        self._device = device
        self._doing = f"running {name}"
        self._places: dict[str, int] = {}
        self._scratch = (0, 0)
        self._graph: Graph | None = None
        self._warm = False
        if context.active_optimization_profile != profile:
            device.ask(self._doing, context.set_optimization_profile_async, profile, device.stream.handle)
        for tensor, shape in shapes.items():
            device.ask(self._doing, context.set_input_shape, tensor, shape)

    def output_shape(self, tensor: str) -> tuple[int, ...]:
        """Return the shape of an output for the shapes of the inputs."""
        shape = tuple(int(size) for size in self.context.get_tensor_shape(tensor))
        if any(size < 0 for size in shape):
            raise EngineError(f"{self._doing}: output {tensor} has no size before it is computed, {list(shape)}; export"
                              " the graph again")  # fmt: skip
        return shape

    def place(self, addresses: Mapping[str, int], activations: DeviceBuffer) -> None:
        """Point the context at its inputs, outputs and activations; a graph with other addresses is dropped."""
        scratch = (activations.address, activations.nbytes)
        if self._places == addresses and self._scratch == scratch:
            return
        self.drop_graph()
        self._places, self._scratch = {}, (0, 0)  # nothing is known to be set until all of it is
        for tensor, address in addresses.items():
            self._device.ask(self._doing, self.context.set_tensor_address, tensor, address)
        self.context.set_device_memory(*scratch)
        self._places, self._scratch = dict(addresses), scratch

    @property
    def wants_graph(self) -> bool:
        """Whether a graph is worth capturing: a first run flushed what the shapes had deferred, a second one comes."""
        return self._warm and self._graph is None

    def capture(self) -> None:
        """Capture the graph that `run` launches from then on. Raises EngineError, ResourceError."""
        self._graph = self._device.stream.capture(self._enqueue, self._doing)

    def run(self) -> None:
        """Put the computation on the device's stream, as a graph where there is one."""
        if self._graph is not None:
            self._device.stream.launch(self._graph, self._doing)
        else:
            self._enqueue()
            self._warm = True

    def drop_graph(self) -> None:
        """Free the graph; the next runs capture another."""
        if self._graph is not None:
            self._graph.free()
        self._graph, self._warm = None, False

    def _enqueue(self) -> None:
        self._device.ask(self._doing, self.context.execute_async_v3, self._device.stream.handle)


class ShapedContexts:
    """The contexts of one engine, made by `create`, for the shapes that were used last."""

    def __init__(self, device: TrtDevice, name: str, create: Callable[[], Any]) -> None:
        self._device = device
        self._name = name
        self._create = create
        self._idle = [create()]  # now, so that what can fail fails while the engine is loaded
        self._shaped: dict[tuple[tuple[str, tuple[int, ...]], ...], ShapedContext] = {}

    def get(self, shapes: Shapes, choose: Callable[[Shapes], int]) -> ShapedContext:
        """Return the context for `shapes`; for new ones, with the profile that `choose` returns, or what it raises."""
        key = tuple(sorted(shapes.items()))
        shaped = self._shaped.pop(key, None)
        if shaped is None:
            profile = choose(shapes)
            shaped = ShapedContext(self._device, self._take(), self._name, profile, shapes)
        self._shaped[key] = shaped  # the last place: the first one's shapes were used longest ago
        return shaped

    def free(self) -> None:
        """Drop the contexts and their graphs."""
        for shaped in self._shaped.values():
            shaped.drop_graph()
        self._shaped, self._idle = {}, []

    def _take(self) -> Any:
        if not self._idle and len(self._shaped) >= MAX_SHAPES:
            oldest = self._shaped.pop(next(iter(self._shaped)))
            oldest.drop_graph()
            self._idle.append(oldest.context)
        return self._idle.pop() if self._idle else self._create()
