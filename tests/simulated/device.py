"""The simulated device: its settings, injected failures and counters."""

__all__ = ["SimulatedDevice", "current"]

import importlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines.bundle.plan_record import Environment, Flavour
from simulated.binding import LOCK, specification
from simulated.cudart import NAME, make_module
from simulated.errors import SimulationError, violations
from simulated.memory import Memory
from simulated.plans import Execution
from simulated.streams import Streams

GIB = 1 << 30
RTX_VERSION = "1.7.1.0"
_MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_installed: list["SimulatedDevice"] = []


def current() -> "SimulatedDevice":
    """Return the installed device, which TensorRT's classes use."""
    if not _installed:
        raise SimulationError("a stand-in for TensorRT is used outside the test that installed it")
    return _installed[-1]


@dataclass(eq=False)
class Load:
    """A call of TensorRT that synchronizes the device at any moment; `spoiled`: a capture ran at the same time."""

    spoiled: bool


class SimulatedDevice:
    """A simulated GPU, used through stand-ins for `tensorrt` and `cuda.bindings.runtime`.

    Between `install` and `remove` the code under test imports the stand-ins. Figures are in bytes; the device's memory
    contains allocations of cudaMalloc, the weights of engines, and the activations of contexts that own theirs.
    """

    def __init__(self, memory: int = 24 * GIB) -> None:
        self.name = "Simulated GPU"
        self.compute_capability = (8, 9)
        self.memory = Memory(memory)
        self.version = specification()["version"]
        self.streams = Streams()
        self.flavour: Flavour = "tensorrt"
        self.calls: Counter[str] = Counter()
        """How often each CUDA function was called."""
        self.bytes_moved: Counter[str] = Counter()
        """Copied bytes by kind: HostToDevice, DeviceToHost, DeviceToDevice, weights (of engines), streamed."""
        self.transfers: list[tuple[str, int]] = []
        """Every copy that has run, in order: kind and bytes."""
        self.deserialized: list[str] = []
        """The sha256 of every plan that was deserialized, in order."""
        self.executed: list[str] = []
        """The component of every execution, in order."""
        self.logged: list[tuple[str, str]] = []
        """TensorRT's log: severity and message."""
        self.living: Counter[str] = Counter()
        """The number of TensorRT's objects that are alive: Runtime, ICudaEngine, IExecutionContext."""
        self.sticky = False
        self.leaks_matter = True
        """Whether the fixture checks at its end for leaks and swallowed violations."""
        self.during_load: Callable[[str], None] | None = None
        """Called in the middle of "deserialize" and "create context", while other threads can use the device."""
        self.sources: dict[str, tuple[Path, Path]] = {}
        """The files of graph and weights by their digests, as in plans."""
        self.left_behind = 0
        self.ignores_budgets = False
        """Whether engines put all weights on the device, whatever their weight streaming budget."""
        self._spoils: list[list[Any]] = []
        self._seen: Counter[str] = Counter()
        self._sticky_after: int | None = None
        self._fails: Counter[str] = Counter()
        self._loads: list[Load] = []
        self._replaced: dict[str, Any] = {}
        self._runtime: Any = None
        self.cudart: Any = None

    # Read by tests

    @property
    def memory_limit(self) -> int:
        """The device's memory; tests may set it."""
        return self.memory.size

    @memory_limit.setter
    def memory_limit(self, size: int) -> None:
        self.memory.size = size

    @property
    def current_bytes(self) -> int:
        """The bytes in use on the device."""
        return self.memory.current

    @property
    def peak_bytes(self) -> int:
        """The peak of `current_bytes` since `reset_peak`."""
        return self.memory.peak

    def reset_peak(self) -> None:
        """Reset the peak to `current_bytes`."""
        self.memory.peak = self.memory.current

    def since(self) -> dict[str, int]:
        """Return the bytes copied since the last call, by kind, without kinds of 0 bytes."""
        moved = self.bytes_moved - self._seen
        self._seen = Counter(self.bytes_moved)
        return dict(moved)

    def check_no_leaks(self) -> None:
        """Raise AssertionError if anything was not freed, or if the code under test swallowed a violation."""
        left = [str(block) for block in self.memory.living()]
        left += [f"stream {stream.handle:#x}" for stream in self.streams.all.values() if stream.alive and stream.handle]
        left += [f"event {event.handle:#x}" for event in self.cudart.events.values() if event.alive]
        left += [f"graph {graph.handle:#x}" for graph in self.cudart.graphs.values() if graph.alive]
        left += [f"{count} {name}" for name, count in self.living.items() if count]
        if violations:
            raise AssertionError(f"{len(violations)} violations were swallowed, the first: {violations[0]}")
        if left:
            raise AssertionError(f"not freed: {'; '.join(left)}")

    # Failures injected by tests

    def fail_allocation(self, n: int = 1) -> None:
        """Make the `n`-th next reservation of device memory fail: allocations, engines, contexts."""
        self.memory.failing.add(self.memory.attempts + n)

    def sticky_after(self, n: int) -> None:
        """Make every CUDA call after the next `n` return cudaErrorIllegalAddress."""
        self._sticky_after = self.calls.total() + n

    def fail_next_deserialize(self, times: int = 1) -> None:
        """Make the next deserialize_cuda_engine return None."""
        self._fails["deserialize"] += times

    def fail_next_execute(self, times: int = 1) -> None:
        """Make the next execute_async_v3 return False."""
        self._fails["execute"] += times

    def fail_capture(self, times: int = 1) -> None:
        """Make the next cudaStreamBeginCapture fail."""
        self._fails["capture"] += times

    def spoil(self, match: Callable[[Execution], bool], value: float | None = None, times: int = -1) -> None:
        """Make executions that match compute wrong outputs, all or the next `times`: negated, or all of `value`."""
        self._spoils.append([match, value, times])

    def keep_after_unloading(self, size: int) -> None:
        """Make every engine that is unloaded leave `size` bytes in use."""
        self.left_behind = size

    @contextmanager
    def violation(self, match: str) -> Iterator[None]:
        """Expect a SimulationError whose message matches."""
        with pytest.raises(SimulationError, match=match):
            yield
        violations.clear()

    # Used by the stand-ins

    def take(self, what: str) -> bool:
        """Return whether this call is to fail, and count it."""
        if not self._fails[what]:
            return False
        self._fails[what] -= 1
        return True

    def spoiled(self, execution: Execution, outputs: dict[str, Any]) -> dict[str, Any]:
        """Return the outputs of an execution as `spoil` left them."""
        for spoil in self._spoils:
            match, value, times = spoil
            if times and match(execution):
                spoil[2] -= 1
                outputs = {name: -array if value is None else np.full_like(array, value)
                           for name, array in outputs.items()}  # fmt: skip
        return outputs

    def take_capture_failure(self) -> bool:
        """Return whether this capture is to fail, and count it."""
        return self.take("capture")

    def tick(self) -> None:
        """Count a CUDA call for `sticky_after`."""
        if self._sticky_after is not None and self.calls.total() > self._sticky_after:
            self.sticky = True

    def moved(self, kind: str, size: int) -> None:
        """Record a copy of `size` bytes."""
        self.bytes_moved[kind] += size
        self.transfers.append((kind, size))

    def spoils_capture(self, *, every: bool = False) -> bool:
        """Return whether a stream is being captured that forbids this call; that capture becomes invalid.

        `every`: the call synchronizes the device, which no capture survives, in whatever thread and mode.
        """
        spoiled = [
            stream
            for stream in self.streams.capturing()
            if every or stream.mode == 0 or (stream.mode == 1 and stream.thread == threading.get_ident())
        ]
        for stream in spoiled:
            stream.invalid = True
        return bool(spoiled)

    def spoils_loads(self) -> bool:
        """Return whether other threads are loading, which a capture that begins now lets fail."""
        for load in self._loads:
            load.spoiled = True
        return bool(self._loads)

    def capturing_here(self) -> bool:
        """Return whether the calling thread is capturing a stream."""
        return any(stream.thread == threading.get_ident() for stream in self.streams.capturing())

    @contextmanager
    def loading(self, what: str) -> Iterator[Load]:
        """Mark a call that synchronizes the device; it fails if its record is `spoiled` at the end of the context."""
        load = Load(self.spoils_capture(every=True))
        self._loads.append(load)
        try:
            if self.during_load is not None:
                LOCK.release()  # held once, by the call from outside
                try:
                    self.during_load(what)
                finally:
                    LOCK.acquire()
            yield load
        finally:
            self._loads.remove(load)

    # Installing

    def install(self, flavour: Flavour = "tensorrt") -> None:
        """Put the stand-ins into sys.modules; the other flavour counts as not installed."""
        from simulated.api import make_tensorrt

        self.remove()
        violations.clear()
        module, self.cudart = make_module(self)
        self.flavour = flavour
        self.version = RTX_VERSION if flavour == "tensorrt-rtx" else specification()["version"]
        self._replace(NAME, module)
        package = importlib.import_module("cuda.bindings")
        self._runtime = package.__dict__.get("runtime")
        package.runtime = module  # type: ignore[attr-defined]
        for each, name in _MODULES.items():
            self._replace(name, make_tensorrt(name, self.version) if each == flavour else None)
        _installed.append(self)

    def remove(self) -> None:
        """Restore the modules that `install` replaced."""
        for name, module in self._replaced.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
        if self._replaced:
            importlib.import_module("cuda.bindings").runtime = self._runtime  # type: ignore[attr-defined]
            _installed.remove(self)
        self._replaced.clear()

    def _replace(self, name: str, module: Any) -> None:
        self._replaced[name] = sys.modules.get(name)
        sys.modules[name] = module

    def environment(self) -> Environment:
        """Return the environment of this device as the code under test finds it, without counting its calls."""
        from sdxl_trt.engines.backends.trt.environment import current_environment

        calls, sticky = Counter(self.calls), self._sticky_after
        self._sticky_after = None
        try:
            return current_environment(self.flavour)
        finally:
            self.calls, self._sticky_after = calls, sticky

    def bundle(self, path: Path, target: Path, **sizes: Any) -> Path:
        """Return `target`, a copy of the bundle at `path` with simulated plans; see make_simulated_bundle."""
        from simulated.bundles import make_simulated_bundle

        return make_simulated_bundle(self, path, target, **sizes)
