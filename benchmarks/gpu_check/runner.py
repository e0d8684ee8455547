"""Run checks one by one under a time bound, each in a process of its own.

A fresh process sees the libraries that a command would see, and a crash or a hang ends one check and no other.
"""

__all__ = ["ProcessRunner", "Runner", "run_checks"]

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

import msgspec

from sdxl_trt.benchmarks.gpu_check.checks import Check
from sdxl_trt.benchmarks.measure import CheckResult
from sdxl_trt.engines.host import one_line

CHILD = "sdxl_trt.benchmarks.gpu_check.child"
FACTS_SECONDS = 60.0
KILL_SECONDS = 10.0
_TAIL = 1 << 14


class Runner(Protocol):
    """Runs a check for at most some seconds, and returns its result."""

    def __call__(self, check: Check, seconds: float, /) -> CheckResult:
        """Run `check`; a check that takes longer than `seconds` is killed and has failed."""


def run_checks(
    checks: Sequence[Check],
    runner: Runner,
    seconds: float,
    tell: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[CheckResult]:
    """Run `checks` in order for at most `seconds` in all and yield the results; `tell` receives lines on the progress.

    A check that needs more time than is left is not run, and one that is still running when the time is up is killed
    and counts as not run, too; shorter checks after it may still fit. If an essential check did not pass, the others of
    its provider are skipped.
    """
    end = clock() + seconds
    missing: dict[str, str] = {}
    for number, check in enumerate(checks, 1):
        left = end - clock()
        if check.provider in missing:
            yield CheckResult(check.name, "skipped", 0.0, missing[check.provider])
            continue
        tell(f"check {number} of {len(checks)}, {_minutes(left)} left: {check.name}")
        result = _run(check, runner, left)
        tell(f"  {result.outcome} after {result.seconds:.1f} s: {result.seen}")
        if check.essential and result.outcome != "ok":
            missing[check.provider] = f"see “{check.name}”"
        yield result


def _run(check: Check, runner: Runner, left: float) -> CheckResult:
    if left < check.needs:
        seen = f"out of time: it needs about {check.needs:.0f} s, {max(left, 0):.0f} s were left; give more --minutes"
        return CheckResult(check.name, "not run", 0.0, seen)
    result = runner(check, min(left, check.most))
    if result.outcome == "FAILED" and left <= check.most and result.seconds >= left:
        seen = f"out of time: it was ended after {result.seconds:.0f} s; give more --minutes"
        return msgspec.structs.replace(result, outcome="not run", seen=seen)
    return result


def _minutes(seconds: float) -> str:
    whole = max(int(seconds), 0)
    return f"{whole // 60}:{whole % 60:02} min"


class ProcessRunner:
    """Runs each check in a child process with its own process group; `folder` is the workplace.

    With `debug` the children's stderr is this process's: tracebacks and the libraries' messages.
    """

    def __init__(self, folder: Path, *, debug: bool = False, command: Sequence[str] = ()) -> None:
        self._folder = folder
        self._debug = debug
        self._command = command or (sys.executable, "-P", "-X", "faulthandler", "-m", CHILD)

    def __call__(self, check: Check, seconds: float, /) -> CheckResult:
        """See Runner."""
        started = time.monotonic()
        output, ended = self._run(check.name, seconds)
        taken = time.monotonic() - started
        if not ended:
            try:
                return msgspec.structs.replace(msgspec.json.decode(output, type=CheckResult), name=check.name)
            except msgspec.MsgspecError:
                ended = "its process ended without a result"
        return CheckResult(check.name, "FAILED", taken, ended)

    def facts(self) -> dict[str, str]:
        """Return the machine's facts by name, asked in a child: asking CUDA takes device memory until the end."""
        output, ended = self._run("facts", FACTS_SECONDS)
        try:
            return {"GPU": ended} if ended else msgspec.json.decode(output, type=dict[str, str])
        except msgspec.MsgspecError:
            return {"GPU": "its process ended without a result"}

    def _run(self, name: str, seconds: float) -> tuple[bytes, str]:
        """Return a child's stdout, and how it ended, "" for well."""
        pipe = subprocess.PIPE
        with tempfile.TemporaryFile() as said:
            child = subprocess.Popen(  # noqa: S603 - our own module
                [*self._command, str(self._folder), name], stdin=pipe, stdout=pipe,
                stderr=None if self._debug else said, start_new_session=True,
            )  # fmt: skip
            output, late = b"", ""
            try:
                # Its stdin stays open: if this process is killed, stdin closes and the child ends itself.
                output = _read(child, seconds)
            except subprocess.TimeoutExpired:
                late = f"it was killed after {seconds:.0f} s"
            finally:
                gone = _kill(child)
            if late:
                return b"", late if gone else f"{late} and did not end"
            return output, _ended(child.returncode, said)


def _read(child: "subprocess.Popen[bytes]", seconds: float) -> bytes:
    """Return what `child` writes until it ends. Raises TimeoutExpired after `seconds`."""
    # communicate() would close stdin; without it, only stdout is waited for.
    stdin, child.stdin = child.stdin, None
    try:
        return child.communicate(timeout=seconds)[0]
    finally:
        child.stdin = stdin


def _kill(child: "subprocess.Popen[bytes]") -> bool:
    """Kill a child that still runs, with its process group, and return whether it has ended.

    A child that has ended leaves none: what it started ends when its stdin closes. A process that waits in a driver
    may survive SIGKILL: it is waited for only some seconds, and the other checks run without it.
    """
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            if sys.platform == "win32":
                child.kill()
            else:
                os.killpg(child.pid, signal.SIGKILL)
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            stream.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=KILL_SECONDS)
    return child.returncode is not None


def _ended(code: int, said: IO[bytes]) -> str:
    """Return how a child ended badly, with the last line it said, or "" if it ended well."""
    if not code:
        return ""
    said.seek(max(0, said.seek(0, os.SEEK_END) - _TAIL))
    lines = [line for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    fatal = [line for line in lines if line.startswith("Fatal Python error")]
    last = one_line((fatal or lines or ["it said nothing"])[-1])[:300]
    how = f"ended with exit code {code}" if code > 0 else f"was killed by signal {-code}"
    return f"its process {how}: {last}"
