"""What a check finds, and how it fails or does not apply."""

__all__ = ["Failed", "Finding", "Skipped", "engine_warnings", "finding", "require"]

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sdxl_trt.benchmarks.measure import Figure


@dataclass(frozen=True)
class Finding:
    """What a check found: one line for people, and figures by name."""

    seen: str
    figures: tuple[Figure, ...] = ()


class Skipped(Exception):  # noqa: N818 - not an error: the check does not apply here
    """Raised by a check that the machine or the bundle cannot run; the message says what is missing."""


class Failed(AssertionError):  # noqa: N818 - read as an outcome
    """Raised by a check whose result is wrong; `found` has the figures all the same."""

    def __init__(self, found: Finding) -> None:
        super().__init__(found.seen)
        self.found = found


def finding(seen: str, *figures: Figure) -> Finding:
    """Return a finding with these figures."""
    return Finding(seen, figures)


def require(holds: object, found: Finding, otherwise: str) -> Finding:
    """Return `found` if `holds`; else raise Failed with its figures, and what was required instead in `otherwise`."""
    if not holds:
        raise Failed(Finding(f"{found.seen}; {otherwise}", found.figures))
    return found


@contextmanager
def engine_warnings() -> Iterator[list[str]]:
    """Collect the engines' log warnings while the context is open: the yielded list grows."""
    messages: list[str] = []
    handler, log = _Collector(messages), logging.getLogger("sdxl_trt.engines")
    log.addHandler(handler)
    try:
        yield messages
    finally:
        log.removeHandler(handler)


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())
