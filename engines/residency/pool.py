"""A pool of engines under a residency policy: loads them when a phase needs them, frees them as the policy says."""

__all__ = ["EnginePool"]

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self

from sdxl_trt.engines.adapters import ScaledLora, Use, loras_of, name_of
from sdxl_trt.engines.bundle import USUAL_RUN, Bundle, PlanRecord, Profile, Workload
from sdxl_trt.engines.engine import Engine
from sdxl_trt.engines.errors import CorruptError, IncompatibleError, ResourceError, SourceError
from sdxl_trt.engines.host import available_host_memory, format_bytes
from sdxl_trt.engines.plans import PlanLimits, RunSizes
from sdxl_trt.engines.residency.estimate import MemoryEstimate, Residency
from sdxl_trt.engines.residency.loading import LoadAhead, load
from sdxl_trt.engines.residency.policy import can_run, fit_beside
from sdxl_trt.engines.residency.read_ahead import ReadAhead, bytes_ahead

log = logging.getLogger(__name__)
MOST_LOADS = 1000
"""Loads that a pool remembers: a server's never ends."""


class EnginePool:
    """Loads and frees the engines of a bundle; a context manager that frees them all, and the device.

    `resident` keeps every loaded engine, or only those that `keeps` names, and those of `optional`: components that
    only some runs use, with their bytes, as long as all of them fit beside what is planned. `swap` and `stream` hold
    the engines of one phase: a phase frees all others before it loads its own, so base and refiner never share memory.
    If memory runs out while engines are loaded, the pool continues with the next of `fallbacks`.

    A component with LoRAs (`adapted`) stands wherever a component's name may. There is one engine of a component: other
    LoRAs than those it has are put on it when a phase asks for them, and all others are taken off.

    `make` is called with a component name and, if its weights stream, with the bytes that may be on the device, from
    `budgets`. `replaced` maps a component to the one that runs instead. With `records`, a thread reads the plans of the
    components that `expect` names, before their phases and in their order, at most `ahead` bytes (by default half of
    the available memory); `slot_records` are those of components with LoRAs. `activations` are the bytes to reserve for
    components when they are loaded. `estimate` is `estimate_memory` for this pool's bundle and device, which
    `make_room` asks, for runs with `workload` unless they say otherwise; without it, nothing is refused before it is
    loaded.
    """

    def __init__(
        self,
        bundle: Bundle,
        make: Callable[..., Engine],
        residency: Residency,
        provider: str,
        *,
        keeps: Iterable[str] | None = None,
        optional: Mapping[str, int] | None = None,
        fallbacks: tuple[Residency, ...] = (),
        budgets: Mapping[str, int] | None = None,
        replaced: Mapping[str, str] | None = None,
        records: Mapping[str, PlanRecord] | None = None,
        slot_records: Mapping[str, PlanRecord] | None = None,
        limits: PlanLimits | None = None,
        ahead: int | None = None,
        activations: Mapping[str, int] | None = None,
        estimate: Callable[..., MemoryEstimate] | None = None,
        workload: Workload = USUAL_RUN,
        close: Callable[[], None] = lambda: None,
        memory: Callable[[], tuple[int, int] | None] = lambda: None,
        computes: str | None = None,
    ) -> None:
        self.bundle = bundle
        self.residency: Residency = residency
        self.provider = provider
        self.computes = computes
        """The precision in which every graph is computed; None if each is computed in its own."""
        self.records = records or {}
        """The plans in use, by component."""
        self._slot_records = slot_records or {}
        self.limits = limits
        """The sizes that the plans in use accept; None if only the graphs limit them."""
        self.loads: list[str] = []
        """The latest loaded components, in loading order; one that got other LoRAs is named again."""
        self.swaps = 0
        """How often one UNet replaced another that had been freed."""
        self.workload = workload
        """What the runs ask that memory was planned for."""
        self._make = make
        self._optional = optional or {}
        self._keeps = frozenset(bundle.manifest.components if keeps is None else keeps) | self._optional.keys()
        self._fallbacks = fallbacks
        self._budgets = budgets or {}
        self._replaced = replaced or {}
        self._activations = activations or {}
        self._estimate = estimate
        self._stale = False
        self._close = close
        self.memory = memory
        """Returns (free, total) bytes of the GPU, of all processes; None if unknown or on a CPU."""
        self._engines: dict[str, Engine] = {}
        self._worn: dict[str, tuple[ScaledLora, ...]] = {}
        self._prefetched: dict[str, Engine] = {}
        self._ahead: LoadAhead | None = None
        self._last_unet = ""
        self._reads: ReadAhead | None = None
        if self.records:
            sizes = {name: max(record.file.size, self._slot_records.get(name, record).file.size)
                     for name, record in self.records.items()}  # fmt: skip
            limit = bytes_ahead(sizes.values(), available_host_memory()) if ahead is None else ahead
            self._reads = ReadAhead(self._new, sizes, limit)

    @property
    def preparing(self) -> bool:
        """Whether a thread still loads engines of the next phase."""
        return self._ahead is not None and self._ahead.running

    @property
    def loaded(self) -> tuple[str, ...]:
        """The components whose engines are loaded, in loading order; any thread may ask."""
        return tuple(self._engines)

    def holds(self, use: Use) -> bool:
        """Return whether a component is loaded with exactly these LoRAs, so that a phase would not load it."""
        name = self.stand_in(name_of(use))
        return name in self._engines and self._worn.get(name, ()) == loras_of(use)

    def expect(self, names: Iterable[Use]) -> None:
        """State the components that the coming run uses, in order; a component used twice may be named twice.

        Their plans are read ahead from now on, instead of those expected so far, except for engines that are loaded and
        stay loaded. Without plans it does nothing.
        """
        if self._reads is None:
            return
        staying = self._staying()
        loading = () if self._ahead is None else map(name_of, self._ahead.uses)
        wanted: list[Use] = []
        seen = {name for name in (*self._engines, *loading) if name in staying}
        for use in self._resolve(names):
            if name_of(use) not in seen:
                wanted.append(use)
            seen |= {name_of(use)} & staying
        self._reads.expect(wanted)

    def check(self, uses: Iterable[Use]) -> None:
        """Raise now what a phase of `uses` would raise for their LoRAs; nothing is loaded, and no values are read.

        What only the values show, such as sums beyond fp16's range, is raised by the phase. Raises SourceError,
        IncompatibleError, and CorruptError for files that changed.
        """
        for use in self._resolve(uses):
            if loras_of(use):
                self._new(use)  # an engine that is not loaded compares LoRAs with its plan or graph, and no more

    def phase(self, *names: Use, next_engines: tuple[Use, ...] = ()) -> tuple[Engine, ...]:
        """Free the engines that the policy does not keep; load and return those of the components `names`.

        A thread then prepares `next_engines`, those of the next phase: it loads those that the policy keeps, and reads
        and checks the plans of the others. Its errors are raised by the next call, those of a plan by the phase that
        uses it. Raises ResourceError if memory runs out under the last policy, and what Engine.load raises.
        """
        wanted = self._resolve(names)
        while True:
            try:
                self._take_over()
                self._unload(() if self._stale else (*map(name_of, wanted), *self._staying()))
                self._stale = False
                engines = tuple(self._load(use) for use in wanted)
                break
            except ResourceError as exc:
                self._fall_back(exc)
        self._prepare([use for use in self._resolve(next_engines) if name_of(use) not in self._engines])
        return engines

    def make_room(self, run: RunSizes, uses: Iterable[Use] = (), workload: Workload | None = None) -> None:
        """Make sure that a run of these sizes, which uses `uses`, fits into memory, before its next phase.

        Components that are not named, or named without LoRAs, count with their usual plans. `workload` is the run's, by
        default that of the pool.

        What it changes takes effect with the next phase: engines of another run may be in use. Nothing is done without
        plans. The profiles of a run may need more than those of the usual size: if the pool was
        free to choose its residency, it continues with the first that fits. Raises SizeError for sizes that the plans
        do not take, ResourceError if the builder's own figures exceed the whole memory.
        """
        chosen = self._planned(run, uses, workload)
        if chosen is None:
            return
        if chosen.residency != self.residency:
            log.warning("residency %s: %sx%s needs more memory than there is; continuing with %s", self.residency,
                        run.width, run.height, chosen.residency)  # fmt: skip
            self._fallbacks = self._fallbacks[self._fallbacks.index(chosen.residency) + 1 :]
            self.residency = chosen.residency
            self._start_over_later()
        self._activations = {need.component: need.activations for need in chosen.needs}
        self._tighten(chosen)

    def check_room(self, run: RunSizes, uses: Iterable[Use] = (), workload: Workload | None = None) -> None:
        """Raise what `make_room` would raise, and change nothing: any thread may ask."""
        self._planned(run, uses, workload)

    def _planned(self, run: RunSizes, uses: Iterable[Use], workload: Workload | None) -> MemoryEstimate | None:
        """Return the first plan that fits a run, None where nothing is planned; the errors are `make_room`'s."""
        if self._estimate is None or not self.records:
            return None
        slotted = {name_of(use): self._slot_records[name_of(use)] for use in uses
                   if loras_of(use) and name_of(use) in self._slot_records}  # fmt: skip
        estimate = partial(self._estimate, workload=self.workload if workload is None else workload)
        if slotted:
            estimate = partial(estimate, records={**self.records, **slotted})
        plans = [estimate(residency=each, run=run) for each in (self.residency, *self._fallbacks)]
        chosen = min(plans, key=lambda plan: plan.missing)  # the first of those that fit
        if not can_run(chosen, chosen.peak):
            raise self._too_large(chosen, estimate(residency=chosen.residency), run)
        return chosen

    def _tighten(self, plan: MemoryEstimate) -> None:
        """Keep no more than `plan` does: another request of this pool may still run with its larger needs."""
        if plan.residency == "resident":
            self._keeps &= frozenset(plan.keeps) | (
                self._optional.keys() if fit_beside(plan, self._optional) else set()
            )
        smaller = {name: budget for name, budget in plan.budgets.items() if budget < self._budgets.get(name, budget)}
        if smaller:
            self._budgets = {**self._budgets, **smaller}
            self._start_over_later()  # an engine's budget is set before it is loaded

    def _too_large(self, plan: MemoryEstimate, usual: MemoryEstimate, run: RunSizes) -> ResourceError:
        limits = self.limits
        if limits is None or not can_run(usual, usual.peak):
            return plan.refusal()
        return ResourceError(
            f"{run.width}x{run.height} with {run.tokens} tokens: {plan.shortage}; the plans' usual size,"
            f" {limits.width.opt}x{limits.height.opt} with {limits.tokens.opt} tokens, needs"
            f" {format_bytes(plan.peak - usual.peak)} less"
        )

    def stand_in(self, name: str) -> str:
        """Return the component that runs for `name` on this provider, usually itself."""
        return self._replaced.get(name, name)

    def profiles(self, name: str) -> tuple[Profile, ...]:
        """Return the profiles that limit the inputs of component `name`, or () if only its graph does."""
        name = self.stand_in(name)
        if self.provider == "ort-tensorrt":
            from sdxl_trt.engines.backends.ort import shape_limits  # noqa: PLC0415 - only this provider's

            return (shape_limits(self.bundle, name),)
        record = self.records.get(name)
        return record.key.profiles if record else ()

    def free(self, keep: tuple[Use, ...] = ()) -> None:
        """Wait for the thread that prepares engines, then unload every engine except those to `keep`.

        Plans are no longer read ahead, until the next call of `expect` or of `phase` with `next_engines`.
        """
        try:
            self._take_over()
        except Exception as exc:  # noqa: BLE001 - there is no next phase to raise it
            log.warning("%s", exc)
        if self._reads is not None:
            self._reads.expect(())
        self._unload(tuple(map(name_of, self._resolve(keep))))

    def close(self) -> None:
        """Unload every engine and close the device; the pool cannot be used afterwards."""
        with ExitStack() as stack:
            stack.callback(self._close)
            stack.callback(self.free)
            if self._reads is not None:
                self._reads.close()

    def _resolve(self, uses: Iterable[Use]) -> tuple[Use, ...]:
        return tuple(self.stand_in(use) if isinstance(use, str) else use for use in uses)

    def _staying(self) -> frozenset[str]:
        return self._keeps if self.residency == "resident" else frozenset()

    def _unload(self, keep: Iterable[str]) -> None:
        with ExitStack() as stack:  # if one fails to unload, the others are unloaded all the same
            for held in (self._prefetched, self._engines):
                for name in held.keys() - set(keep):
                    stack.callback(held.pop(name).unload)

    def _take_over(self) -> None:
        """Wait for the thread, take over the engines that it prepared, and raise the error that stopped it."""
        if self._ahead is None:
            return
        error = self._ahead.finish()
        ahead, self._ahead = self._ahead, None
        self._prefetched |= {name_of(use): engine for use, engine in ahead.prefetched.items()}
        for use, engine in ahead.loaded.items():
            self._enter(use, engine)
        if error is not None:
            raise error

    def _prepare(self, uses: list[Use]) -> None:
        """Let a thread load those of `uses` that stay; the others are read ahead."""
        staying = self._staying()
        if self._reads is not None:
            order = self._reads.order
            if missing := [use for use in uses if use not in order]:
                self._reads.expect((*missing, *order))
            uses = [use for use in uses if name_of(use) in staying]
        if uses:
            self._ahead = LoadAhead(self._new, self._ready, uses, staying)

    def _load(self, use: Use) -> Engine:
        name = name_of(use)
        if name not in self._engines:
            self._enter(use, self._ready(use))
        elif not self.holds(use):
            self._change(use)
        return self._engines[name]

    def _change(self, use: Use) -> None:
        """Put the LoRAs of `use` on its loaded engine, and take off the others; if that fails, the engine is gone."""
        name = name_of(use)
        engine = self._engines[name]
        with ExitStack() as stack:
            stack.callback(engine.unload)
            stack.callback(self._engines.pop, name)
            try:
                engine.adapt(loras_of(use))
            except (SourceError, IncompatibleError, CorruptError):  # refused, it stays as it was
                stack.pop_all()
                raise
            load(engine, self._activations.get(name, 0))
            stack.pop_all()
        self._enter(use, engine)

    def _ready(self, use: Use) -> Engine:
        """Return a loaded engine of a component, from what was read ahead."""
        name = name_of(use)
        if self._reads is None:
            engine = self._prefetched.pop(name, None) or self._new(use)
            engine.adapt(loras_of(use))
            load(engine)
            return engine
        try:
            engine = self._reads.take(use)
            load(engine, self._activations.get(name, 0))
        finally:
            self._reads.loaded(use)
        return engine

    def _new(self, use: Use) -> Engine:
        name = name_of(use)
        streamed = self.residency == "stream" and name in self._budgets
        engine = self._make(name, self._budgets[name]) if streamed else self._make(name)
        engine.adapt(loras_of(use))
        return engine

    def _enter(self, use: Use, engine: Engine) -> None:
        name = name_of(use)
        self._engines[name], self._worn[name] = engine, loras_of(use)
        self.loads.append(name)
        del self.loads[:-MOST_LOADS]
        if self.bundle.manifest.components[name].kind == "unet":
            self.swaps += self._last_unet not in ("", name, *self._engines)
            self._last_unet = name

    def _fall_back(self, exc: ResourceError) -> None:
        """Free everything and switch to the next policy; raise `exc` if there is none."""
        if not self._fallbacks:
            raise exc
        before = self.residency
        self.residency, *rest = self._fallbacks
        self._fallbacks = tuple(rest)
        log.warning("residency %s: %s; continuing with %s", before, exc, self.residency)
        self._start_over()

    def _start_over_later(self) -> None:
        """Let the next phase unload every engine; what is expected is read ahead again, for engines made anew."""
        self._stale = True
        if self._reads is not None:
            expected = self._reads.order
            self._reads.expect(())
            self._reads.expect(expected)

    def _start_over(self) -> None:
        """Unload every engine, and read ahead what was expected."""
        expected = self._reads.order if self._reads is not None else ()
        self.free()
        self.expect(expected)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
