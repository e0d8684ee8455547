"""What holds while a command works: warnings are lines on stderr, and SIGTERM unwinds the stack as an interrupt does.

On Windows, where no other process can send SIGTERM, SIGBREAK does: of Ctrl-Break, and of a console that is closed.

The console imports this when the work begins: ``--help`` needs neither logging nor signals.
"""

__all__ = ["logging_to_stderr", "unwinding_on_sigterm"]

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn, TextIO

from sdxl_trt.engines.host.paths import one_line


class _Handler(logging.StreamHandler[TextIO]):
    """Writes above a progress line, if tqdm draws one."""

    def emit(self, record: logging.LogRecord) -> None:
        bars = sys.modules.get("tqdm")
        with bars.tqdm.external_write_mode(self.stream) if bars else contextlib.nullcontext():
            super().emit(record)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {one_line(record.getMessage())}"


@contextlib.contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Show the library's warnings as lines on stderr, and on nothing else, while a command runs."""
    logger = logging.getLogger("sdxl_trt")
    handler = _Handler(sys.stderr)
    handler.setFormatter(_OneLine())
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


@contextlib.contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Let SIGTERM, and SIGBREAK on Windows, unwind the stack as an interrupt does: what is half-written is removed."""

    def leave(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGBREAK") if hasattr(signal, name)]
    previous = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
