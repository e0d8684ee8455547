"""Load engines completely or not at all, and prepare others in a thread while the device computes."""

__all__ = ["LoadAhead", "load"]

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from sdxl_trt.engines.adapters import Use, name_of
from sdxl_trt.engines.engine import Engine
from sdxl_trt.engines.errors import ResourceError

log = logging.getLogger(__name__)


def load(engine: Engine, activations: int = 0) -> None:
    """Load `engine` and reserve bytes for its activations; if that fails, unload it before the error propagates."""
    with ExitStack() as stack:
        stack.callback(engine.unload)
        engine.load()
        if activations:
            engine.reserve(activations)
        stack.pop_all()


class LoadAhead:
    """A thread that prepares the engines of `uses`: loads those of components in `stay`, prefetches the others.

    `ready` returns a loaded engine, `make` one to prefetch. The results are in `loaded` and `prefetched`; the caller
    owns them once `finish` has returned.
    """

    def __init__(
        self,
        make: Callable[[Use], Engine],
        ready: Callable[[Use], Engine],
        uses: Sequence[Use],
        stay: frozenset[str],
    ) -> None:
        self.loaded: dict[Use, Engine] = {}
        self.prefetched: dict[Use, Engine] = {}
        self.uses = tuple(uses)
        self._make, self._ready, self._stay = make, ready, stay
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"make ready {' '.join(map(name_of, uses))}", daemon=True
        )
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the thread still prepares engines."""
        return self._thread.is_alive()

    def finish(self) -> BaseException | None:
        """Wait for the thread to end; return the exception that stopped it, or None."""
        self._thread.join()
        return self._error

    def _run(self) -> None:
        try:
            for use in self.uses:
                self._prepare(use)
        except BaseException as exc:  # noqa: BLE001 - raised by the caller of `finish`
            self._error = exc

    def _prepare(self, use: Use) -> None:
        if name_of(use) in self._stay:
            self.loaded[use] = self._ready(use)
            return
        engine = self._make(use)
        with ExitStack() as stack:
            stack.callback(engine.unload)
            try:
                engine.prefetch()
            except ResourceError as exc:
                # Reading ahead only saves time; the phase itself raises if memory is short.
                log.warning("%s was not read ahead: %s", name_of(use), exc)
                return
            self.prefetched[use] = engine
            stack.pop_all()
