"""The stand-in for TensorRT's execution context: shapes, addresses, and the computation on a stream."""

__all__ = ["ContextState", "IExecutionContext", "create_context"]

import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sdxl_trt.engines.bundle.manifest import TensorSpec
from sdxl_trt.engines.engine import numpy_dtype
from simulated.binding import LOCK, Bound
from simulated.enumerations import Severity, Strategy
from simulated.errors import SimulationError
from simulated.memory import Block, Span
from simulated.plans import Execution, compute, output_shape
from simulated.shapes import Dims
from simulated.streams import Work

WHERE = "IExecutionContext::enqueueV3"


@dataclass(eq=False)
class ContextState:
    """The state of a context that queued work uses; `itself` is its internal memory, used by one stream at a time."""

    engine: Any
    strategy: Any
    owned: int
    itself: Block
    profile: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    memory: tuple[int, int] = (0, 0)
    needed: int | None = None
    """The activation bytes for the shapes, if they were queried."""
    generation: int = 0
    warm: bool = False
    alive: bool = True

    def change(self) -> None:
        """Record that the state differs from that of earlier captures."""
        self.generation += 1
        self.warm = False
        self.needed = None

    def close(self) -> None:
        """Free the memory that the context owned; Python may call this in any thread."""
        with LOCK:
            self.alive = False
            self.engine.device.spoils_capture(every=True)
            self.engine.contexts -= 1
            self.engine.device.memory.release(self.owned)
            self.engine.device.living["IExecutionContext"] -= 1

    def refuse_during_capture(self, call: str) -> None:
        """Raise SimulationError if this thread is capturing: the graph would mix two states of the context."""
        if self.engine.device.capturing_here():
            raise SimulationError(f"{call} was called during a capture; set everything before it")

    def unspecified(self) -> list[str]:
        """Return the inputs without a shape."""
        return [spec.name for spec in self.engine.plan.inputs if spec.name not in self.shapes]

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """Return the shape of a tensor, with -1 for unknown sizes."""
        if spec in self.engine.plan.inputs:
            return self.shapes.get(spec.name, tuple(dim if isinstance(dim, int) else -1 for dim in spec.shape))
        if self.unspecified():
            return tuple(dim if isinstance(dim, int) else -1 for dim in spec.shape)
        return output_shape(self.engine.plan.inputs, spec, self.shapes)

    def problem(self) -> str:
        """Return why the context cannot run, in TensorRT's words, or ""."""
        if missing := self.unspecified():
            return f"Error Code 3: API Usage Error (input {missing[0]} has no shape; call setInputShape)"
        if missing := [name for name in self.engine.plan.tensors() if not self.addresses.get(name)]:
            return f"Error Code 3: API Usage Error (tensor {missing[0]} has no address; call setTensorAddress)"
        needed = self.engine.activations(self.profile) if self.needed is None else self.needed
        if self.strategy == Strategy.USER_MANAGED and self.memory[1] < needed:
            return (f"Error Code 3: API Usage Error (device memory of {self.memory[1]} bytes is set, {needed} are"
                    " needed; call setDeviceMemoryV2)")  # fmt: skip
        return ""


class IExecutionContext(Bound, original="IExecutionContext"):
    """Runs an engine; it keeps the engine alive."""

    _state: ContextState

    @property
    def engine(self) -> Any:
        return self._engine

    @property
    def name(self) -> str:
        return str(self._names[0])

    @name.setter
    def name(self, value: str) -> None:
        self._names[0] = value

    @property
    def active_optimization_profile(self) -> int:
        return self._state.profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        state, device = self._state, self._state.engine.device
        state.refuse_during_capture("set_optimization_profile_async")
        if not 0 <= profile_index < len(state.engine.plan.profiles) or device.sticky or not self._fit(profile_index):
            state.engine.log("IExecutionContext::setOptimizationProfileAsync: Error Code 3: API Usage Error")
            raise RuntimeError("Error in set optimization profile async.")
        state.profile = profile_index
        state.shapes.clear()
        state.change()
        own = Span(state.itself, 0, 1, written=True)
        device.streams.enqueue(device.cudart.stream(stream_handle), Work("profile switch", lambda: None, (own,)))
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        state = self._state
        state.refuse_during_capture("set_input_shape")
        spec, given = self._tensor(name), tuple(int(size) for size in shape)
        profile = state.engine.plan.profiles[state.profile]
        if spec not in state.engine.plan.inputs or not profile.holds({name: given}):
            state.engine.log(
                f"IExecutionContext::setInputShape: Error Code 3: API Usage Error (Parameter check failed, condition:"
                f" engineDims.d[i] == dims.d[i]. Static dimension mismatch or out of profile {state.profile} while"
                f" setting input shape for {name}: {list(given)})"
            )
            return False
        if state.shapes.get(name) != given:
            state.shapes[name] = given
            state.change()
        return True

    def get_tensor_shape(self, name: str) -> Any:
        return Dims(self._state.shape(self._tensor(name)))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        state = self._state
        state.refuse_during_capture("set_tensor_address")
        self._tensor(name)
        if memory:
            state.engine.device.memory.device(int(memory), 0, f"set_tensor_address({name!r})", aligned=True)
        if state.addresses.get(name) != int(memory):
            state.generation += 1
        state.addresses[name] = int(memory)
        return True

    def get_tensor_address(self, name: str) -> int:
        self._tensor(name)
        return self._state.addresses.get(name, 0)

    def get_max_output_size(self, name: str) -> int:
        spec, plan = self._tensor(name), self._state.engine.plan
        largest = {key: shapes[2] for key, shapes in plan.profiles[self._state.profile].shapes.items()}
        return int(np.prod(output_shape(plan.inputs, spec, largest))) * np.dtype(numpy_dtype(spec)).itemsize

    def infer_shapes(self) -> list[str]:
        return self._state.unspecified()

    def update_device_memory_size_for_shapes(self) -> int:
        state = self._state
        if state.unspecified():
            state.engine.log("IExecutionContext::updateDeviceMemorySizeForShapes: Error Code 3: API Usage Error")
            return 0
        state.needed = state.engine.plan.needed(state.profile, state.shapes) + state.engine.scratch
        return state.needed

    def set_device_memory(self, memory: int, size: int) -> None:
        state = self._state
        state.refuse_during_capture("set_device_memory")
        if state.strategy != Strategy.USER_MANAGED:
            raise SimulationError("set_device_memory on a context that has its own memory: TensorRT logs an error")
        state.engine.device.memory.device(int(memory), int(size), "set_device_memory", aligned=True)
        state.memory = (int(memory), int(size))

    def execute_async_v3(self, stream_handle: int) -> bool:
        state, device = self._state, self._state.engine.device
        stream = device.cudart.stream(stream_handle)
        problem = state.problem()
        if device.sticky:
            problem = "Error Code 1: Cuda Runtime (an illegal memory access was encountered)"
        elif device.take("execute"):
            problem = "Error Code 1: Cuda Runtime (invalid argument)"
        elif stream.captured is not None and (not state.warm or state.engine.streams):
            # The first run after a change does deferred work that cannot be captured: NVIDIA's guide requires it. An
            # engine that streams weights waits for the device.
            stream.invalid = True
            problem = "Error Code 1: Cuda Runtime (operation not permitted when stream is capturing)"
        elif stream.captured is not None and stream.invalid:
            problem = "Error Code 1: Cuda Runtime (operation failed due to a previous error during capture)"
        if problem:
            state.engine.log(f"{WHERE}: {problem}")
            return False
        if stream is device.streams.default:
            state.engine.log(f"{WHERE}: Using default stream may lead to performance issues", Severity.WARNING)
        device.streams.enqueue(stream, _work(state, captured=stream.captured is not None))
        state.warm = state.warm or stream.captured is None
        return True

    def _fit(self, profile: int) -> bool:
        """Return whether the activations of `profile` fit, if the context owns them."""
        state = self._state
        if state.strategy != Strategy.ON_PROFILE_CHANGE:
            return True
        needed, had = state.engine.activations(profile), state.owned
        state.engine.device.memory.release(had)
        state.owned = needed if state.engine.reserve(needed, "IExecutionContext::setOptimizationProfileAsync") else 0
        return state.owned == needed

    def _tensor(self, name: str) -> TensorSpec:
        tensors: dict[str, TensorSpec] = self._state.engine.plan.tensors()
        if name not in tensors:
            raise SimulationError(f"{self._state.engine.plan.component} has no tensor {name!r}")
        return tensors[name]


def _work(state: ContextState, *, captured: bool) -> Work:
    """Return the computation with the current shapes, addresses and memory."""
    plan, generation = state.engine.plan, state.generation
    shapes = {name: state.shape(spec) for name, spec in plan.tensors().items()}
    spans, scratch = _spans(state, shapes), _scratch(state)
    for span in spans.values():
        if span.written and any(other is not span and span.overlaps(other) for other in [*spans.values(), *scratch]):
            raise SimulationError(f"{plan.component}: an output overlaps another tensor or the activations")

    def check() -> None:
        if not state.alive:
            raise SimulationError(f"{plan.component}: queued work ran after its context was destroyed; wait for it")
        if captured and generation != state.generation:
            raise SimulationError(
                f"{plan.component}: a graph was launched after the context it was captured from had been changed"
                " (shapes, profile or addresses)"
            )

    def run() -> None:
        _run(state, shapes, spans, captured=captured)

    return Work(plan.component, run, (*spans.values(), *scratch), check=check)


def _spans(state: ContextState, shapes: dict[str, tuple[int, ...]]) -> dict[str, Span]:
    """Return the memory of every tensor, with the size of its shape."""
    plan, memory, spans = state.engine.plan, state.engine.device.memory, {}
    for name, spec in plan.tensors().items():
        size = int(np.prod(shapes[name])) * np.dtype(numpy_dtype(spec)).itemsize
        span = memory.device(state.addresses[name], size, f"{plan.component}: {name}", aligned=True)
        spans[name] = replace(span, written=spec in plan.outputs)
    return spans


def _scratch(state: ContextState) -> list[Span]:
    """Return the working memory: the context itself, and the activations if the caller owns them."""
    scratch = [Span(state.itself, 0, 1, written=True)]
    if state.strategy == Strategy.USER_MANAGED:
        what = f"{state.engine.plan.component}: activations"
        scratch.append(replace(state.engine.device.memory.device(*state.memory, what, aligned=True), written=True))
    return scratch


def _run(
    state: ContextState, shapes: dict[str, tuple[int, ...]], spans: dict[str, Span], *, captured: bool = False
) -> None:
    plan, device = state.engine.plan, state.engine.device
    execution = Execution(plan, state.profile, shapes, captured, state.engine.budget < plan.streamable)
    inputs = {
        spec.name: spans[spec.name].bytes.view(numpy_dtype(spec)).reshape(shapes[spec.name]) for spec in plan.inputs
    }
    for name, result in device.spoiled(execution, compute(plan, device.sources, inputs)).items():
        if result.shape != shapes[name]:
            raise SimulationError(f"{plan.component}: {name} has shape {result.shape}, not {shapes[name]}")
        spans[name].bytes[:] = result.reshape(-1).view(np.uint8)
    device.executed.append(plan.component)
    if state.engine.streams:
        device.moved("streamed", plan.streamable - state.engine.budget)


def create_context(engine: Any, state: Any, strategy: Any) -> Any:
    """Return a context of `engine`, or None if it does not fit on the device."""
    doing, device, plan = "ICudaEngine::createExecutionContext", state.device, state.plan
    with device.loading("create context") as load:
        refused = device.sticky
    if refused or load.spoiled:
        state.log(f"{doing}: Error Code 1: Cuda Runtime")
        return None
    owned = {
        Strategy.STATIC: max(map(state.activations, range(len(plan.profiles)))),
        Strategy.ON_PROFILE_CHANGE: state.activations(0),
        Strategy.USER_MANAGED: 0,
    }[strategy]
    if not state.place(doing):
        return None
    if not state.reserve(owned, doing):
        return None
    own = ContextState(state, strategy, owned, Block(0, 1, "device", f"the context of {plan.component}"))
    # Static shapes are known from the start.
    own.shapes = {spec.name: spec.shape for spec in plan.inputs if all(isinstance(dim, int) for dim in spec.shape)}  # type: ignore[misc]
    state.contexts += 1
    device.living["IExecutionContext"] += 1
    context = IExecutionContext._made(_state=own, _engine=engine, _names=[""])
    weakref.finalize(context, own.close).atexit = False
    return context
