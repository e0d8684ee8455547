"""The stand-in for TensorRT's engine: the properties of its plan, and its weights on the device."""

__all__ = ["EngineState", "ICudaEngine", "IRuntimeConfig", "open_engine"]

import weakref
from dataclasses import dataclass
from typing import Any

from simulated.binding import LOCK, Bound
from simulated.contexts import create_context
from simulated.enumerations import OF_NUMPY, EngineStat, Strategy, TensorFormat, TensorIOMode, TensorLocation
from simulated.errors import SimulationError
from simulated.plans import Plan, rounded
from simulated.shapes import Dims


@dataclass(eq=False)
class EngineState:
    """The state of an engine; it refers to no Python object of the code under test."""

    plan: Plan
    device: Any
    log: Any
    budget: int
    contexts: int = 0
    placed: int = 0
    """The bytes of weights on the device; with streaming, 0 before the first context."""

    @property
    def scratch(self) -> int:
        """The bytes that streaming needs in addition to the activations: a buffer for weights in transit."""
        return rounded(min(self.plan.streamable - self.budget, self.plan.streamable // 8))

    @property
    def streams(self) -> bool:
        """Whether some weights stay in host memory: such an engine is synchronous, and cannot be captured."""
        return self.plan.streamable > self.budget

    def activations(self, profile: int) -> int:
        """Return the bytes that a context needs in `profile`."""
        return self.plan.activations[profile] + self.scratch

    def reserve(self, size: int, doing: str) -> bool:
        """Reserve device memory, or log TensorRT's out-of-memory error and return False."""
        if self.device.memory.reserve(size):
            return True
        self.log("[defaultAllocator.cpp::allocate::19] Error Code 1: Cuda Runtime (out of memory)")
        self.log(f"{doing}: Error Code 2: OutOfMemory (Requested size was {size} bytes.)")
        return False

    def place(self, doing: str) -> bool:
        """Put the weights, up to the budget, on the device if they are not there yet."""
        budget = self.plan.streamable if self.device.ignores_budgets else self.budget
        wanted = self.plan.weights_bytes - self.plan.streamable + budget
        if self.placed == wanted:
            return True
        if not self.reserve(wanted, doing):
            return False
        self.placed = wanted
        self.device.moved("weights", wanted)
        return True

    def close(self) -> None:
        """Free the weights' memory; Python may call this in any thread."""
        with LOCK:
            self.device.spoils_capture(every=True)
            self.device.memory.release(self.placed - self.device.left_behind)
            self.device.living["ICudaEngine"] -= 1


class IRuntimeConfig(Bound, original="IRuntimeConfig"):
    """The settings of a new context."""

    def get_execution_context_allocation_strategy(self) -> Any:
        return self._strategy

    def set_execution_context_allocation_strategy(self, strategy: Any = Strategy.STATIC) -> None:
        object.__setattr__(self, "_strategy", strategy)


class ICudaEngine(Bound, original="ICudaEngine"):
    """A loaded plan. Its weights stay on the device until it and its contexts are deleted."""

    _state: EngineState

    @property
    def num_io_tensors(self) -> int:
        return len(self._state.plan.tensors())

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._state.plan.profiles)

    @property
    def num_aux_streams(self) -> int:
        return 0

    @property
    def name(self) -> str:
        return self._state.plan.component

    @property
    def refittable(self) -> bool:
        return False

    def __getitem__(self, arg0: int) -> str:
        return list(self._state.plan.tensors())[arg0]

    def get_tensor_name(self, index: int) -> str:
        return list(self._state.plan.tensors())[index]

    def get_tensor_mode(self, name: str) -> Any:
        spec = self._tensor(name)
        return TensorIOMode.INPUT if spec in self._state.plan.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return OF_NUMPY[self._tensor(name).dtype]

    def get_tensor_shape(self, name: str) -> Any:
        return Dims(tuple(dim if isinstance(dim, int) else -1 for dim in self._tensor(name).shape))

    def get_tensor_location(self, name: str) -> Any:
        self._tensor(name)
        return TensorLocation.DEVICE

    def get_tensor_format(self, name: str, profile_index: int = 0) -> Any:
        self._tensor(name)
        return TensorFormat.LINEAR

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        self._tensor(name)
        shapes = self._state.plan.profiles[profile_index].shapes
        if name not in shapes:
            raise SimulationError(f"{name} is an output: profiles have only inputs")
        return [Dims(shape) for shape in shapes[name]]

    def is_shape_inference_io(self, name: str) -> bool:
        self._tensor(name)
        return False

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self._state.activations(profile_index)

    @property
    def device_memory_size_v2(self) -> int:
        return max(map(self._state.activations, range(len(self._state.plan.profiles))))

    def get_engine_stat(self, stat: Any = EngineStat.TOTAL_WEIGHTS_SIZE) -> int:
        return self._state.plan.weights_bytes if stat == EngineStat.TOTAL_WEIGHTS_SIZE else -1

    @property
    def streamable_weights_size(self) -> int:
        return self._state.plan.streamable

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        return self._state.scratch

    def get_weight_streaming_automatic_budget(self) -> int:
        memory = self._state.device.memory
        return min(self._state.plan.streamable, max((memory.size - memory.current) // 2, 0))

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._state.budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, value: int) -> None:
        state = self._state
        if state.contexts:
            # The real setter fails without an exception: its return value is lost.
            raise SimulationError("weight_streaming_budget_v2 was set while contexts exist; it does not change")
        if value < 0 or not state.plan.streamable:
            raise SimulationError(f"weight_streaming_budget_v2 = {value} on an engine that can stream"
                                  f" {state.plan.streamable} bytes; it does not change")  # fmt: skip
        if state.device.spoils_capture(every=True):
            raise SimulationError("weight_streaming_budget_v2 was set during a capture: it moves weights")
        state.budget = min(value, state.plan.streamable)
        state.device.memory.release(state.placed)
        state.placed = 0

    def create_runtime_config(self) -> Any:
        return IRuntimeConfig._made(_strategy=Strategy.STATIC)

    def create_execution_context(self, strategy: Any = Strategy.STATIC, runtime_config: Any = None) -> Any:
        chosen = strategy if runtime_config is None else runtime_config.get_execution_context_allocation_strategy()
        return create_context(self, self._state, chosen)

    def _tensor(self, name: str) -> Any:
        tensors = self._state.plan.tensors()
        if name not in tensors:
            raise SimulationError(f"{self._state.plan.component} has no tensor {name!r}; it has {sorted(tensors)}")
        return tensors[name]


def open_engine(runtime: Any, device: Any, plan: Plan) -> Any:
    """Return the engine of `plan`, which keeps `runtime` alive; None if its weights do not fit on the device."""
    state = EngineState(plan, device, runtime._state["log"], plan.streamable)
    # NVIDIA's guide: with weight streaming, deserialization keeps all weights in a host buffer.
    if not plan.streamable and not state.place("IRuntime::deserializeCudaEngine"):
        return None
    engine = ICudaEngine._made(_state=state, _runtime=runtime)
    device.living["ICudaEngine"] += 1
    weakref.finalize(engine, state.close).atexit = False
    return engine
