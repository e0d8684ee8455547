"""What the commands share: one-line errors with their exit codes, warnings on stderr, JSON on stdout."""

__all__ = ["Parser", "print_json", "run"]

import argparse
import logging
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from sdxl_trt.engines.errors import ResourceError, SdxlTrtError

INTERRUPTED = 130
USAGE = 2


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without abbreviations that a later flag would break."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit 2."""
        self.exit(USAGE, f"error: {_one_line(message)}; see {self.prog} --help\n")


def run(parser: Parser, work: Callable[[argparse.Namespace], None], argv: list[str] | None) -> int:
    """Parse, work, and return the exit code; `--debug` adds the traceback to the one-line error."""
    arguments = parser.parse_args(argv)
    _log_to_stderr()
    try:
        work(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left half-written", INTERRUPTED)
    except Exception as exc:  # noqa: BLE001 - the boundary: whatever it was, the user gets one line
        if arguments.debug:
            traceback.print_exc()
        return _fail(*_explain(exc))
    return 0


def _explain(exc: Exception) -> tuple[str, int]:
    if isinstance(exc, SdxlTrtError):
        return str(exc), exc.exit_code
    if isinstance(exc, MemoryError):
        remedy = "try a smaller size, fewer pictures, or --residency swap"
        return f"out of memory; {remedy}", ResourceError.exit_code
    return f"{type(exc).__name__}: {exc}; this is a defect: please report it with what --debug prints", 1


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    import msgspec  # noqa: PLC0415 - --help must not wait for it

    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"error: {_one_line(message)}\n")
    return code


def _one_line(message: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in message).split())


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {record.getMessage()}"


def _log_to_stderr() -> None:
    logger = logging.getLogger("sdxl_trt")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_OneLine())
        logger.addHandler(handler)
        logger.propagate = False
