"""Read plans into host memory before they are needed, in the order of use and within a limit of bytes."""

__all__ = ["ReadAhead", "bytes_ahead"]

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

from sdxl_trt.engines.adapters import Use, name_of
from sdxl_trt.engines.engine import Engine
from sdxl_trt.engines.errors import ResourceError

log = logging.getLogger(__name__)

# The rest is for the pictures, the caches of the system, and other programs.
_SHARE = 0.5
_PATIENCE = 0.05


def bytes_ahead(sizes: Iterable[int], available: int | None) -> int:
    """Return how many bytes of plans of these `sizes` may be in host memory at once.

    That is all of them, or half of the `available` bytes if that is less; at least the largest plan, without which
    nothing can be loaded. With `available` unknown (None) it is the largest plan.
    """
    sizes = tuple(sizes)
    largest = max(sizes, default=0)
    share = largest if available is None else int(available * _SHARE)
    return max(largest, min(share, sum(sizes)))


class ReadAhead:
    """A thread that prefetches engines, one after the other, in the order in which a run will load them.

    `make` makes an engine, whose `load` and `unload` may be called while it is in `prefetch`; `sizes` are the bytes of
    plans by component. The plans that are in memory, those that are being loaded included, have at most `limit` bytes:
    the thread waits until there is room. `peak` is the most that they had.
    """

    def __init__(self, make: Callable[[Use], Engine], sizes: Mapping[str, int], limit: int) -> None:
        self.limit = max(limit, max(sizes.values(), default=0))
        self.peak = 0
        self._make, self._sizes = make, sizes
        self._changed = threading.Condition()
        self._order: list[Use] = []
        self._read: dict[Use, Engine] = {}
        self._failed: dict[Use, BaseException | None] = {}
        self._loading: dict[Use, int] = {}
        self._current: Engine | None = None
        self._abandoned = False
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def order(self) -> tuple[Use, ...]:
        """The components still to be taken, in the order of use."""
        with self._changed:
            return tuple(self._order)

    def expect(self, names: Iterable[Use]) -> None:
        """Read the plans of the components `names`, in this order, instead of those expected so far.

        A component may be named twice, if its plan is read twice. Plans that are not among them are given up, even the
        one that is being read.
        """
        with self._changed:
            self._order = list(names)
            dropped = self._drop(set(self._order))
            self._changed.notify_all()
            if self._order and self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="read plans ahead", daemon=True)
                self._thread.start()
        _unload(dropped)

    def take(self, name: Use) -> Engine:
        """Return the engine of component `name`, its plan read, being read, or not yet begun; the caller owns it.

        Components expected before it are passed over: their plans are given up. The plan counts until `loaded` is
        called. Raises the error of reading this plan.
        """
        with self._changed:
            if name in self._order:
                del self._order[: self._order.index(name) + 1]
            dropped = self._drop({name, *self._order})
            engine, error = self._read.pop(name, None), self._failed.pop(name, None)
            if error is None:
                if engine is None:
                    dropped += self._make_room(self._size(name))
                self._loading[name] = self._size(name)
                self._count()
            self._changed.notify_all()
        _unload(dropped)
        if error is not None:
            raise error
        return self._make(name) if engine is None else engine

    def loaded(self, name: Use) -> None:
        """Count the plan of `name` no longer: it was loaded, or that failed."""
        with self._changed:
            self._loading.pop(name, None)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop reading, give up all plans, and wait for the thread to end."""
        with self._changed:
            taken = self._current if self._current not in self._read.values() and not self._abandoned else None
            self._closed, self._order = True, []
            dropped = self._drop(set[Use]())
            self._changed.notify_all()
        _unload(dropped)
        while self._thread is not None and self._thread.is_alive():
            current = self._current
            # One that was taken belongs to who loads it now; another may have begun after the others were given up.
            if current is not None and current is not taken:
                current.unload()
            self._thread.join(_PATIENCE)

    def _drop(self, kept: set[Use]) -> list[Engine]:
        """Forget the engines and errors of all components but `kept`; return the engines for the caller to unload."""
        for name in self._failed.keys() - kept:
            error = self._failed.pop(name)
            if error is not None:
                log.warning("%s", error)
        return [self._give_up(name) for name in self._read.keys() - kept]

    def _make_room(self, nbytes: int) -> list[Engine]:
        """Forget engines, those needed last first, until `nbytes` more are within the limit; return them."""
        dropped = []
        for name in sorted(self._read, key=self._order.index, reverse=True):
            if self._bytes() + nbytes <= self.limit:
                break
            dropped.append(self._give_up(name))
        return dropped

    def _give_up(self, name: Use) -> Engine:
        engine = self._read.pop(name)
        self._abandoned = self._abandoned or engine is self._current
        return engine

    def _bytes(self) -> int:
        return sum(self._size(name) for name in self._read) + sum(self._loading.values())

    def _size(self, use: Use) -> int:
        return self._sizes.get(name_of(use), 0)

    def _count(self) -> None:
        self.peak = max(self.peak, self._bytes())

    def _run(self) -> None:
        while name := self._next():
            error: BaseException | None = None
            try:
                engine = self._begin(name)
                if engine is not None:
                    engine.prefetch()
            except BaseException as exc:  # noqa: BLE001 - raised by `take`
                error = exc
            self._end(name, error)

    def _next(self) -> Use:
        """Wait until there is a plan to read, and room for it; return its component, or "" at the end."""
        with self._changed:
            while not self._closed:
                name = next((name for name in self._order if name not in self._read and name not in self._failed), "")
                if name and self._bytes() + self._size(name) <= self.limit:
                    return name
                self._changed.wait()
            return ""

    def _begin(self, name: Use) -> Engine | None:
        """Enter an engine for `name`, unless it is no longer expected."""
        with self._changed:
            if name not in self._order:
                return None
            self._current = self._read[name] = self._make(name)
            self._count()
            return self._current

    def _end(self, name: Use, error: BaseException | None) -> None:
        """Keep the error for who takes the component, unless it was taken or given up meanwhile; then free the rest."""
        with self._changed:
            engine, self._current = self._current, None
            surplus, self._abandoned = self._abandoned, False
            if error is not None and self._read.get(name) is engine:
                self._read.pop(name, None)
                surplus = True
                self._failed[name] = error
                if isinstance(error, ResourceError):
                    # Reading ahead only saves time; the phase itself raises if memory is short.
                    log.warning("%s was not read ahead: %s", name_of(name), error)
                    self._failed[name] = None
        if surplus and engine is not None:
            engine.unload()


def _unload(engines: Iterable[Engine]) -> None:
    with ExitStack() as stack:
        for engine in engines:
            stack.callback(engine.unload)
