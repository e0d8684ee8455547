"""trt-bench's side of a contestant's process: send questions, and wait for answers with a time limit."""

__all__ = ["Child", "ContestantError"]

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from sdxl_trt.benchmarks.contestants import Answer, Ask, Bye, Failed
from sdxl_trt.engines.host import NEW_GROUP, Family, one_line

_LONGEST = 1 << 20
_TAIL = 2000
_FAREWELL = 10.0
_LINGERING = 1.0
"""Seconds that a process may take to exit after its last answer."""
T = TypeVar("T", bound=msgspec.Struct)


class ContestantError(Exception):
    """A contestant failed a question; `gone` if its process is lost and can answer no more."""

    def __init__(self, reason: str, *, gone: bool = False) -> None:
        super().__init__(one_line(reason))
        self.gone = gone


class Child:
    """The process of `command`, started on construction; a context manager that ends it and its children."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        self._buffer = b""
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own commands
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=os.environ | dict(environment or {}),
                start_new_session=True,  # its own process group, killed as a whole
                creationflags=NEW_GROUP,
            )
        except OSError as exc:
            self._errors.close()
            raise ContestantError(f"{command[0]} does not start: {exc.strerror or exc}", gone=True) from exc
        self._family = Family(self._process)

    def ask(self, ask: Ask, wanted: type[T], limit: float) -> T:
        """Return the answer to a question, which must be a `wanted` and arrive within `limit` seconds.

        Raises ContestantError if the contestant reports a failure. Kills it and raises ContestantError if it died,
        timed out, or sent an invalid answer.
        """
        answer = self._answer(ask, limit)
        if isinstance(answer, Failed):
            raise ContestantError(answer.error)
        if not isinstance(answer, wanted):
            raise self._lost(f"answered {ask.do} with {type(answer).__name__}")
        return answer

    def _answer(self, ask: Ask, limit: float) -> Answer:
        assert self._process.stdin is not None  # noqa: S101 - a pipe, as opened
        try:
            self._process.stdin.write(msgspec.json.encode(ask) + b"\n")
            self._process.stdin.flush()
            line = self._line(time.monotonic() + limit)
        except TimeoutError:
            raise self._lost(f"{_said(ask)}: no answer within {limit:g} s") from None
        except OverflowError:
            raise self._lost(f"{_said(ask)}: answered with a line that does not end") from None
        except (OSError, EOFError):
            raise self._lost(f"{_said(ask)}: {self._ended()}") from None
        try:
            answer: Answer = msgspec.json.decode(line, type=Answer)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise self._lost(f"{_said(ask)}: answered {line[:60]!r}, which is not a valid answer") from None
        return answer

    def _line(self, deadline: float) -> bytes:
        """Return the next line. Raises TimeoutError, EOFError, or OverflowError if the line does not end."""
        while b"\n" not in self._buffer:
            if len(self._buffer) > _LONGEST:
                raise OverflowError
            read = self._family.read(deadline - time.monotonic())
            if read is None:
                raise TimeoutError
            if not read:
                raise EOFError
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _ended(self) -> str:
        """Return how the process ended, with the last line of its stderr."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_FAREWELL)
        code = self._process.poll()
        how = "it closed its output" if code is None else f"it was killed by signal {-code}" if code < 0 else (
            f"it ended with exit code {code}")  # fmt: skip
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - _TAIL))
        last = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        return f"{how} ({last[:200]})" if last else how

    def _lost(self, reason: str) -> ContestantError:
        self.kill()
        return ContestantError(reason, gone=True)

    def kill(self) -> None:
        """Kill the process and its group."""
        self._family.kill()
        self._process.wait()

    def close(self) -> None:
        """Ask the process to quit, kill it, and close its pipes; it may already have ended."""
        try:
            if self._process.poll() is None:
                self.ask(Ask(do="quit"), Bye, _FAREWELL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_LINGERING)
        except ContestantError:
            pass
        finally:
            self.kill()
            self._family.close()
            for pipe in (self._process.stdin, self._process.stdout, self._errors):
                with contextlib.suppress(OSError):  # a pipe whose reader is gone
                    pipe.close()  # type: ignore[union-attr]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            with contextlib.suppress(OSError):
                self.kill()
            self.close()


def _said(ask: Ask) -> str:
    return f"{ask.do} {ask.task}".strip()
