"""A run from cold as a timeline: the real EnginePool, with engines that take the time that given rates imply.

Nothing here is measured on a GPU. The pool, its threads and their waiting are the real ones; reading, checking, copying
and steps are sleeps, shortened by `speed`.
"""

__all__ = ["RATES_4090", "Rates", "Span", "Timeline", "draw", "simulate"]

import threading
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, Literal, cast

import msgspec

from sdxl_trt.engines import Array
from sdxl_trt.engines.residency import EnginePool

GB = 1e9
Policy = Literal["swap", "resident"]


class Rates(msgspec.Struct, frozen=True):
    """Given figures of a machine: GB/s, milliseconds, and the bytes of the plans in GB. None is measured here.

    `hash` is sha256 in one thread, `pcie` a copy from pageable memory to the device.
    """

    name: str
    disk: float
    hash: float
    threads: int
    pcie: float
    base_step: float
    refiner_step: float
    encode: float = 20.0
    decode: float = 150.0
    base_steps: int = 24
    refiner_steps: int = 6
    plans: dict[str, float] = msgspec.field(
        default_factory=lambda: {
            "text_encoder": 0.25, "text_encoder_2": 1.39, "unet": 5.18, "refiner_unet": 4.55, "vae_decoder": 0.1,
        }
    )  # fmt: skip


RATES_4090 = Rates("given for an RTX 4090", 5.0, 1.55, 4, 12.0, 83.0, 75.0)
"""Base steps from NVIDIA's and Stability's figures; sha256 alone and sizes as measured on a CPU; the rest is assumed.

The time of new memory pages is left out: it depends on the machine more than anything else here.
"""


class Span(msgspec.Struct, frozen=True):
    """What took from `start` to `stop`, in seconds since the pool was opened: kind is read, load, step or wait."""

    kind: str
    component: str
    start: float
    stop: float


class Timeline(msgspec.Struct, frozen=True):
    """One run: the first step's begin, the stall between base and refiner, and the end, in seconds."""

    name: str
    first_step: float
    stall: float
    end: float
    spans: list[Span]


class _Clock:
    def __init__(self, speed: float) -> None:
        self.speed, self.spans = speed, list[Span]()
        self._started = time.perf_counter()

    def now(self) -> float:
        return (time.perf_counter() - self._started) * self.speed

    def until(self, moment: float) -> None:
        time.sleep(max(moment - self.now(), 0.0) / self.speed)

    def enter(self, kind: str, component: str, start: float) -> None:
        self.spans.append(Span(kind, component, start, self.now()))


class _Engine:
    """An engine that takes the time of its plan; if `chunked`, several threads check it, and it is copied meanwhile."""

    component: Any = None

    def __init__(self, name: str, rates: Rates, clock: _Clock, *, chunked: bool) -> None:
        self._name, self._rates, self._clock, self._chunked = name, rates, clock, chunked
        self._lock = threading.Lock()
        self._arrived: float | None = None
        self._freed = threading.Event()

    def _arrives(self) -> float:
        """Return when the plan is in memory; the first call begins to read it."""
        with self._lock:
            if self._arrived is None:
                rates, now = self._rates, self._clock.now()
                # The system reads ahead, so disk and hash overlap even in one thread.
                rate = min(rates.disk, rates.hash * (rates.threads if self._chunked else 1))
                self._arrived = now + rates.plans[self._name] / rate
                self._clock.spans.append(Span("read", self._name, now, self._arrived))
            return self._arrived

    def prefetch(self) -> None:
        moment = self._arrives()
        self._freed.wait(max(moment - self._clock.now(), 0.0) / self._clock.speed)

    def load(self) -> None:
        start, copied = self._clock.now(), self._rates.plans[self._name] / self._rates.pcie
        arrives = self._arrives()
        if not self._chunked:
            self._clock.until(arrives)
            start = self._clock.now()
        self._clock.until(max(arrives, start + copied))
        self._clock.enter("load", self._name, start)

    def bind(self, constants: Any) -> None:
        raise NotImplementedError

    def infer(self, inputs: Any, outputs: Any = None) -> dict[str, Array]:
        raise NotImplementedError

    def unload(self) -> None:
        self._freed.set()


def simulate(
    name: str, policy: Policy, rates: Rates, *, ahead: bool, speed: float, limit: float | None = None
) -> Timeline:
    """Return the timeline of one picture with base and refiner, from the opening of the pool on.

    With `ahead`, plans have digests of chunks and are read ahead by the pool, at most `limit` GB (default: all);
    without, they are read by one thread, one phase ahead. `speed` is how much faster than the given rates it runs.
    """
    clock = _Clock(speed)
    kinds = {each: "unet" if each.endswith("unet") else "other" for each in rates.plans}
    components = {each: SimpleNamespace(kind=kind) for each, kind in kinds.items()}
    bundle = cast(Any, SimpleNamespace(manifest=SimpleNamespace(components=components)))
    sizes = {each: SimpleNamespace(file=SimpleNamespace(size=int(size * GB))) for each, size in rates.plans.items()}

    def make(component: str) -> _Engine:
        return _Engine(component, rates, clock, chunked=ahead)

    most = int((sum(rates.plans.values()) if limit is None else limit) * GB)
    options: dict[str, Any] = {"records": sizes, "ahead": most} if ahead else {}
    with EnginePool(bundle, cast(Callable[..., Any], make), policy, "tensorrt", **options) as pool:
        pool.expect(rates.plans)
        _run(pool, rates, clock)
    return _timeline(name, clock.spans)


def _run(pool: EnginePool, rates: Rates, clock: _Clock) -> None:
    work = {
        "text_encoder": (1, rates.encode), "text_encoder_2": (1, rates.encode),
        "unet": (rates.base_steps, rates.base_step), "refiner_unet": (rates.refiner_steps, rates.refiner_step),
        "vae_decoder": (1, rates.decode),
    }  # fmt: skip
    order = [*work, ""]
    for component, after in zip(work, order[1:], strict=True):
        pool.phase(component, next_engines=(after,) if after else ())
        steps, milliseconds = work[component]
        for _ in range(steps):
            start = clock.now()
            clock.until(start + milliseconds / 1000)
            clock.enter("step", component, start)


def _timeline(name: str, spans: list[Span]) -> Timeline:
    base = [span for span in spans if (span.kind, span.component) == ("step", "unet")]
    refiner = [span for span in spans if (span.kind, span.component) == ("step", "refiner_unet")]
    stall = refiner[0].start - base[-1].stop
    end = max(span.stop for span in spans if span.kind == "step")
    return Timeline(name, base[0].start, stall, end, sorted(spans, key=lambda span: span.start))


def draw(timeline: Timeline, seconds: float, width: int = 100) -> list[str]:
    """Return the timeline as text of `width` columns for `seconds`: a row each for reading, loading and computing."""
    letters = {"text_encoder": "1", "text_encoder_2": "2", "unet": "B", "refiner_unet": "R", "vae_decoder": "D"}
    rows = []
    for kind, label in (("read", "read"), ("load", "load"), ("step", "compute")):
        row = [" "] * width
        for span in _of(kind, timeline.spans):
            first, last = (int(at / seconds * width) for at in (span.start, span.stop))
            row[first : max(last, first + 1)] = letters[span.component] * (max(last, first + 1) - first)
        rows.append(f"{label:8}|{''.join(row[:width])}|")
    return rows


def _of(kind: str, spans: Iterable[Span]) -> list[Span]:
    return [span for span in spans if span.kind == kind]
