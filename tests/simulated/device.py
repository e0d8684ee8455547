"""The simulated device: what a test sets, breaks and reads."""

__all__ = ["SimulatedDevice", "current"]

import importlib
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.engines.bundle.plan_record import Environment, Flavour
from simulated.binding import specification
from simulated.cudart import NAME, make_module
from simulated.errors import SimulationError, violations
from simulated.memory import Memory
from simulated.streams import Streams

GIB = 1 << 30
RTX_VERSION = "1.7.1.0"
_MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_installed: list["SimulatedDevice"] = []


def current() -> "SimulatedDevice":
    """Return the device that is installed: TensorRT's classes find theirs here."""
    if not _installed:
        raise SimulationError("a stand-in for TensorRT is used outside the test that installed it")
    return _installed[-1]


class SimulatedDevice:
    """A GPU that is not there, behind stand-ins for `tensorrt` and `cuda.bindings.runtime`.

    Between `install` and `remove` the code under test imports the stand-ins. Figures are in bytes; the memory of the
    device holds what cudaMalloc gave, the weights of engines and the activations of contexts that own theirs.
    """

    def __init__(self, memory: int = 24 * GIB) -> None:
        self.name = "Simulated GPU"
        self.compute_capability = (8, 9)
        self.memory = Memory(memory)
        self.version = specification()["version"]
        self.streams = Streams()
        self.flavour: Flavour = "tensorrt"
        self.calls: Counter[str] = Counter()
        """How often each function of CUDA's was called."""
        self.bytes_moved: Counter[str] = Counter()
        """By kind: HostToDevice, DeviceToHost, DeviceToDevice, weights (of engines) and streamed (weights)."""
        self.transfers: list[tuple[str, int]] = []
        """Every copy that has run, in order: kind and bytes."""
        self.deserialized: list[str] = []
        """The sha256 of every plan that was deserialized, in order."""
        self.executed: list[str] = []
        """The component of every execution, in the order in which they ran."""
        self.logged: list[tuple[str, str]] = []
        """What TensorRT logged: severity and message."""
        self.living: Counter[str] = Counter()
        """TensorRT's objects that exist: Runtime, ICudaEngine, IExecutionContext."""
        self.sticky = False
        self.leaks_matter = True
        """Whether the fixture checks at its end that nothing was leaked and no violation swallowed."""
        self.sources: dict[str, tuple[Path, Path]] = {}
        """Graph and weights by their digests, as plans name them."""
        self._seen: Counter[str] = Counter()
        self._sticky_after: int | None = None
        self._fails: Counter[str] = Counter()
        self._replaced: dict[str, Any] = {}
        self._runtime: Any = None
        self.cudart: Any = None

    # What a test reads

    @property
    def memory_limit(self) -> int:
        """The device's memory; may be set."""
        return self.memory.size

    @memory_limit.setter
    def memory_limit(self, size: int) -> None:
        self.memory.size = size

    @property
    def current_bytes(self) -> int:
        """What is in use on the device."""
        return self.memory.current

    @property
    def peak_bytes(self) -> int:
        """The most that was in use since `reset_peak`."""
        return self.memory.peak

    def reset_peak(self) -> None:
        """Forget the peak up to now."""
        self.memory.peak = self.memory.current

    def since(self) -> dict[str, int]:
        """Return the bytes moved since the last call, by kind; kinds that moved none are left out."""
        moved = self.bytes_moved - self._seen
        self._seen = Counter(self.bytes_moved)
        return dict(moved)

    def check_no_leaks(self) -> None:
        """Raise AssertionError where anything was not freed, or where the code under test swallowed a violation."""
        left = [str(block) for block in self.memory.living()]
        left += [f"stream {stream.handle:#x}" for stream in self.streams.all.values() if stream.alive and stream.handle]
        left += [f"event {event.handle:#x}" for event in self.cudart.events.values() if event.alive]
        left += [f"graph {graph.handle:#x}" for graph in self.cudart.graphs.values() if graph.alive]
        left += [f"{count} {name}" for name, count in self.living.items() if count]
        if violations:
            raise AssertionError(f"{len(violations)} violations were swallowed, the first: {violations[0]}")
        if left:
            raise AssertionError(f"not freed: {'; '.join(left)}")

    # What a test breaks

    def fail_allocation(self, n: int = 1) -> None:
        """Let the `n`-th reservation of device memory from now on fail: allocations, engines, contexts."""
        self.memory.failing.add(self.memory.attempts + n)

    def sticky_after(self, n: int) -> None:
        """Let every call to CUDA after the `n`-th from now on return cudaErrorIllegalAddress, for good."""
        self._sticky_after = self.calls.total() + n

    def fail_next_deserialize(self, times: int = 1) -> None:
        """Let the next deserialize_cuda_engine return None."""
        self._fails["deserialize"] += times

    def fail_next_execute(self, times: int = 1) -> None:
        """Let the next execute_async_v3 return False."""
        self._fails["execute"] += times

    def fail_capture(self, times: int = 1) -> None:
        """Let the next cudaStreamBeginCapture fail."""
        self._fails["capture"] += times

    @contextmanager
    def violation(self, match: str) -> Iterator[None]:
        """Expect a SimulationError whose message matches."""
        with pytest.raises(SimulationError, match=match):
            yield
        violations.clear()

    # What the stand-ins ask

    def take(self, what: str) -> bool:
        """Return whether a test wants this call to fail."""
        if not self._fails[what]:
            return False
        self._fails[what] -= 1
        return True

    def take_capture_failure(self) -> bool:
        """Return whether a test wants this capture to fail."""
        return self.take("capture")

    def tick(self) -> None:
        """Note a call to CUDA."""
        if self._sticky_after is not None and self.calls.total() > self._sticky_after:
            self.sticky = True

    def moved(self, kind: str, size: int) -> None:
        """Count bytes that were copied."""
        self.bytes_moved[kind] += size
        self.transfers.append((kind, size))

    def spoils_capture(self) -> bool:
        """Return whether a call that may not happen while a stream is captured happens so; the capture is lost then."""
        spoiled = [
            stream
            for stream in self.streams.capturing()
            if stream.mode == 0 or (stream.mode == 1 and stream.thread == threading.get_ident())
        ]
        for stream in spoiled:
            stream.invalid = True
        return bool(spoiled)

    # Installing

    def install(self, flavour: Flavour = "tensorrt") -> None:
        """Put the stand-ins where `import` finds them; the other flavour counts as not installed."""
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
        """Put back what `install` replaced."""
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
        """Return what plans for this device are keyed by, as the code under test finds it; no call counts."""
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
