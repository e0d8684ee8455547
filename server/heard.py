"""What the runtime warns of while it works for a client: told to the client, and kept out of the log.

A warning may hold a piece of a prompt, and no log may hold one.
"""

__all__ = ["heard", "quietly"]

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
_LOGGER = logging.getLogger("sdxl_trt.runtime")
_MOST = 100
_thread = threading.local()


class _Diverter(logging.Filter):
    """Takes the records of a thread that listens away from the log; other threads' records pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        lines: list[str] | None = getattr(_thread, "lines", None)
        if lines is None:
            return True
        if len(lines) < _MOST:
            lines.append(record.getMessage())
        return False


_LOGGER.addFilter(_Diverter("sdxl_trt.server"))


@contextmanager
def heard() -> Iterator[list[str]]:
    """Collect what the runtime warns of in this thread."""
    before, _thread.lines = getattr(_thread, "lines", None), []
    try:
        yield _thread.lines
    finally:
        _thread.lines = before


def quietly(work: Iterator[Item]) -> Iterator[Item]:
    """Yield the items of `work`, which warns of nothing; between two items the thread may do other work."""
    while True:
        with heard():
            item = next(work, None)
        if item is None:
            return
        yield item
