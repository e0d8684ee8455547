"""Execution contexts, one for each set of input shapes, and the CUDA graphs captured from them.

TensorRT's guide recommends one context per captured graph, with shared activation memory: a graph keeps the shapes,
the profile and every address of its capture, so none of them may change while it is in use.
"""

__all__ = ["MAX_PLACES", "MAX_SHAPES", "ShapedContext", "ShapedContexts"]

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from sdxl_trt.engines.backends.cuda import DeviceBuffer, Graph
from sdxl_trt.engines.backends.trt.device import TrtDevice
from sdxl_trt.engines.errors import EngineError
from sdxl_trt.engines.plans import Shapes

MAX_SHAPES = 4
"""The number of shapes that an engine keeps contexts for: guidance on and off, at two sizes."""
MAX_PLACES = 2
"""The number of contexts for one set of shapes: what one engine keeps for another lies in two buffers, in turn."""


class ShapedContext:
    """A context with fixed profile and input shapes; the caller holds the device's lock during every call."""

    def __init__(self, device: TrtDevice, context: Any, name: str, profile: int, shapes: Shapes, slots: Shapes) -> None:
        self.context = context
        self._device = device
        self._doing = f"running {name}"
        self._places: dict[str, int] = {}
        self._scratch = (0, 0)
        self._graph: Graph | None = None
        self._warm = False
        if context.active_optimization_profile != profile:
            device.ask(self._doing, context.set_optimization_profile_async, profile, device.stream.handle)
        for tensor, shape in (*shapes.items(), *slots.items()):
            device.ask(self._doing, context.set_input_shape, tensor, shape)

    def output_shape(self, tensor: str) -> tuple[int, ...]:
        """Return the shape of an output for the fixed input shapes."""
        shape = tuple(int(size) for size in self.context.get_tensor_shape(tensor))
        if any(size < 0 for size in shape):
            raise EngineError(f"{self._doing}: the size of output {tensor} depends on its data, {list(shape)}; export"
                              " the graph again")  # fmt: skip
        return shape

    def place(self, addresses: Mapping[str, int], activations: DeviceBuffer) -> None:
        """Set the addresses of inputs, outputs and activations; drops the graph if any has changed."""
        scratch = (activations.address, activations.nbytes)
        if self._places == addresses and self._scratch == scratch:
            return
        self.drop_graph()
        self._places, self._scratch = {}, (0, 0)  # unknown until all are set
        for tensor, address in addresses.items():
            self._device.ask(self._doing, self.context.set_tensor_address, tensor, address)
        self.context.set_device_memory(*scratch)
        self._places, self._scratch = dict(addresses), scratch

    @property
    def wants_graph(self) -> bool:
        """Whether to capture a graph: after a first run, which completes the work that setting shapes deferred."""
        return self._warm and self._graph is None

    def capture(self) -> None:
        """Capture the graph that later calls of `run` launch. Raises EngineError, ResourceError."""
        self._graph = self._device.stream.capture(self._enqueue, self._doing)

    def run(self) -> None:
        """Enqueue the computation on the device's stream, as a graph if one was captured."""
        if self._graph is not None:
            self._device.stream.launch(self._graph, self._doing)
        else:
            self._enqueue()
            self._warm = True

    def drop_graph(self) -> None:
        """Free the graph; later runs capture another."""
        if self._graph is not None:
            self._graph.free()
        self._graph, self._warm = None, False

    def _enqueue(self) -> None:
        self._device.ask(self._doing, self.context.execute_async_v3, self._device.stream.handle)


class ShapedContexts:
    """The contexts of one engine for the most recently used shapes; `create` makes one."""

    def __init__(self, device: TrtDevice, name: str, create: Callable[[], Any]) -> None:
        self._device = device
        self._name = name
        self._create = create
        self._idle = [create()]  # now, so that an error is raised while the engine is loaded
        self._shaped: dict[tuple[int, tuple[tuple[str, tuple[int, ...]], ...]], dict[Hashable, ShapedContext]] = {}

    def get(
        self,
        shapes: Shapes,
        choose: Callable[[Shapes], int],
        rank: int = 0,
        slots: Callable[[], Shapes] = dict,
        places: Hashable = None,
    ) -> ShapedContext:
        """Return the context for `shapes`; new shapes use the profile that `choose` returns. Raises what it raises.

        A plan for LoRAs has more inputs than can be compared at every step: `slots` returns their shapes, which are
        those of `rank`. Calls that alternate between two `places` of inputs or outputs have a context for each, so that
        each keeps its graph.
        """
        key = rank, tuple(sorted(shapes.items()))
        placed = self._shaped.get(key, {})
        shaped = placed.get(places)
        if shaped is None:
            profile = choose(shapes)
            context = self._take(placed)
            shaped = ShapedContext(self._device, context, self._name, profile, shapes, slots())
        placed.pop(places, None)
        placed[places] = shaped  # last place: the first entry is the least recently used
        self._shaped.pop(key, None)
        self._shaped[key] = placed
        return shaped

    def free(self) -> None:
        """Drop the contexts and their graphs."""
        for placed in self._shaped.values():
            for shaped in placed.values():
                shaped.drop_graph()
        self._shaped, self._idle = {}, []

    def _take(self, placed: dict[Hashable, ShapedContext]) -> Any:
        """Return a context for shapes that have those in `placed`, and now a further one."""
        if len(placed) >= MAX_PLACES:
            self._retire(placed.pop(next(iter(placed))))
        elif not self._idle and not placed and len(self._shaped) >= MAX_SHAPES:
            for oldest in self._shaped.pop(next(iter(self._shaped))).values():
                self._retire(oldest)
        return self._idle.pop() if self._idle else self._create()

    def _retire(self, shaped: ShapedContext) -> None:
        shaped.drop_graph()
        self._idle.append(shaped.context)
