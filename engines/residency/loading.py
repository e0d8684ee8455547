"""Engines loaded whole or not at all, and made ready by a thread while the device computes."""

__all__ = ["LoadAhead", "load"]

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from sdxl_trt.engines.engine import Engine
from sdxl_trt.engines.errors import ResourceError

log = logging.getLogger(__name__)


def load(engine: Engine) -> None:
    """Load `engine`; where that fails, free what it had taken before the error goes on."""
    with ExitStack() as stack:
        stack.callback(engine.unload)
        engine.load()
        stack.pop_all()


class LoadAhead:
    """A thread that makes the engines of `names` ready: those in `stay` loaded, the others prefetched.

    What it has done lies in `loaded` and `prefetched`, and belongs to the caller, once `finish` has returned.
    """

    def __init__(self, make: Callable[[str], Engine], names: Sequence[str], stay: frozenset[str]) -> None:
        self.loaded: dict[str, Engine] = {}
        self.prefetched: dict[str, Engine] = {}
        self._make, self._names, self._stay = make, names, stay
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"make ready {' '.join(names)}", daemon=True)
        self._thread.start()

    def finish(self) -> BaseException | None:
        """Wait for the thread to end, and return what stopped it, if anything did."""
        self._thread.join()
        return self._error

    def _run(self) -> None:
        try:
            for name in self._names:
                self._make_ready(name)
        except BaseException as exc:  # noqa: BLE001 - for whoever waits to raise
            self._error = exc

    def _make_ready(self, name: str) -> None:
        engine = self._make(name)
        if name in self._stay:
            load(engine)
            self.loaded[name] = engine
            return
        with ExitStack() as stack:
            stack.callback(engine.unload)
            try:
                engine.prefetch()
            except ResourceError as exc:
                # Reading ahead saves time only; whether there is memory is for the phase itself to find out.
                log.warning("%s was not read ahead: %s", name, exc)
                return
            self.prefetched[name] = engine
            stack.pop_all()
