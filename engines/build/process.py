"""Build a plan in a child process: monitored, interruptible, and with an error for every way it can end.

TensorRT builds for minutes inside one call, holds several times the weights in memory, and may crash its process. In
a child process, Ctrl-C acts at once, the memory returns to the system, and a crash becomes an error message.
"""

__all__ = ["BuildEvent", "BuildJob", "BuiltPlan", "build_plan", "build_progress"]

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from sdxl_trt.engines import errors
from sdxl_trt.engines.build.messages import BuildEvent, BuildJob, BuildPhase, BuiltPlan, Made, Message, Refused
from sdxl_trt.engines.errors import EngineError, ResourceError, SdxlTrtError, explain_os_error
from sdxl_trt.engines.host import NEW_GROUP, Family, ProgressLine, atomic_write, interpreter

WORKER = "sdxl_trt.engines.build.worker"
SAMPLE, HEARTBEAT = 0.1, 0.5
"""Seconds between two samples of the child's memory, and between two events while TensorRT reports nothing."""
_TAIL = 1 << 16
# By default glibc raises these two thresholds as it frees blocks, and gives each thread its own arena, so few of the
# blocks that a builder frees return to the system. Fixed values lower the peak by 7 % (SDXL's base UNet, static).
_MALLOC = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
# The log is read as UTF-8, and on Windows Python writes to files and pipes in the code page of the system.
_ENCODING = {"PYTHONIOENCODING": "utf-8"}
# How Windows ends processes: its exit codes are the system's status codes. The first two are for lack of memory.
_NO_MEMORY = (0xC0000017, 0xC000012D)
_STATUSES = {
    0xC0000005: "an access violation",
    0xC000001D: "an illegal instruction",
    0xC00000FD: "a stack overflow",
    0xC0000135: "a missing DLL",
    0xC0000374: "a damaged heap",
    0xC0000409: "a failed check of its memory",
}
Progress = Callable[[BuildEvent], None]


def build_plan(job: BuildJob, *, progress: Progress | None = None) -> BuiltPlan:
    """Build the plan of `job` in a child process and return its record; `progress` is called twice a second.

    ``job.plan`` is written completely or not at all; ``job.log`` always. An exception in this call (KeyboardInterrupt,
    or from `progress`) ends the child at once. Raises ResourceError if memory or disk runs out, CorruptError for a
    file that is not a graph, UsageError for profiles that do not fit the graph, IncompatibleError without TensorRT,
    and EngineError for anything else; each names the reason or the log.
    """
    started = time.monotonic()
    with _open_log(job.log) as log, atomic_write(job.plan) as plan:
        watch = _Watch(job, log, progress, started)
        kills = _oom_kills()
        with _child(job, plan.name, log) as child:
            watch.until_end(child)
        made = _outcome(job, watch.last, child.process.returncode, killed=_oom_kills() > kills)
        written = os.fstat(plan.fileno()).st_size
        if not written or written != made.size:
            raise EngineError(f"building {job.component}: TensorRT reported success and wrote {written} of {made.size}"
                              f" bytes; the log is {job.log}")  # fmt: skip
    return BuiltPlan(
        component=job.component,
        plan=job.plan,
        seconds=time.monotonic() - started,
        peak_anonymous=watch.peaks["RssAnon"],
        peak_file=watch.peaks["RssFile"],
        **msgspec.structs.asdict(made),
    )


def build_progress(line: ProgressLine) -> Progress:
    """Return a function that shows builds on `line`: the phase, the share of a plan, and its process's memory."""

    def show(event: BuildEvent) -> None:
        note = f"{event.resident / 1e9:.1f} GB" if event.resident else ""
        line.draw(event.component, f"{event.component}: {event.phase}", event.share or 0.0, 1, note=note)

    return show


@contextlib.contextmanager
def _open_log(path: Path) -> Iterator[BinaryIO]:
    try:
        file = path.open("wb", buffering=0)
    except OSError as exc:
        raise explain_os_error(exc, f"writing {path}") from exc
    with file:
        yield file


@contextlib.contextmanager
def _child(job: BuildJob, plan: str, log: BinaryIO) -> Iterator[Family]:
    """Start the worker with its job, to write to the file `plan`; kill it on the way out of an exception.

    The worker opens the file by its path, since descriptors cannot be handed over on Windows. If this process is
    killed, the worker ends too: on POSIX it ends itself when its stdin closes, on Windows the system ends it.
    """
    python, variables = interpreter()
    # -P keeps the working directory, which is not trusted, off the child's module path.
    command = [python, "-P", "-X", "faulthandler", "-m", WORKER, str(Path(plan).absolute())]
    settings = _MALLOC | _ENCODING | os.environ | variables
    pipe = subprocess.PIPE
    with subprocess.Popen(  # noqa: S603 - our own module
        command, bufsize=0, stdin=pipe, stdout=pipe, stderr=log, env=settings, creationflags=NEW_GROUP
    ) as process:
        child = Family(process)
        try:
            assert process.stdin  # noqa: S101 - it is a pipe
            with contextlib.suppress(OSError):  # it has already ended; the log has the reason
                process.stdin.write(msgspec.json.encode(job, enc_hook=os.path.abspath) + b"\n")
            yield child
        except BaseException:
            child.kill()
            raise
        finally:
            child.close()


class _Watch:
    """Reads a child's messages and samples its memory until it closes its stdout."""

    def __init__(self, job: BuildJob, log: BinaryIO, progress: Progress | None, started: float) -> None:
        self.last: Message | None = None
        self.peaks = {"RssAnon": 0, "RssFile": 0}
        self._component = job.component
        self._log = log
        self._progress = progress
        self._started = started
        self._phase = BuildPhase(phase="starting")
        self._resident = 0

    def until_end(self, child: Family) -> None:
        """Return when the child has ended. Reports progress when its phase changes, and at every HEARTBEAT."""
        beat = self._started
        rest = b""
        while True:
            chunk = child.read(SAMPLE)
            self._sample(child)
            if chunk == b"":
                break
            *lines, rest = (rest + (chunk or b"")).split(b"\n")
            if self._read(lines) or time.monotonic() >= beat:
                self._report()
                beat = time.monotonic() + HEARTBEAT
        child.process.wait()

    def _read(self, lines: list[bytes]) -> bool:
        """Decode the child's messages and return whether the phase has changed."""
        before = self._phase
        for line in lines:
            try:
                self.last = msgspec.json.decode(line, type=Message)
            except msgspec.DecodeError:
                self._log.write(line + b"\n")  # for instance the output of an interpreter's start-up hook
            if isinstance(self.last, BuildPhase):
                self._phase = self.last
        return self._phase != before

    def _sample(self, child: Family) -> None:
        figures = child.memory()
        self._resident = figures.get("VmRSS", 0)
        for kind in self.peaks:
            self.peaks[kind] = max(self.peaks[kind], figures.get(kind, 0))

    def _report(self) -> None:
        if self._progress:
            seconds = time.monotonic() - self._started
            phase = self._phase
            event = BuildEvent(
                component=self._component,
                phase=phase.phase,
                share=phase.share,
                seconds=seconds,
                resident=self._resident,
            )
            self._progress(event)


def _oom_kills() -> int:
    """Return how many processes Linux has killed for lack of memory; 0 if it does not report it."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _outcome(job: BuildJob, last: Message | None, code: int, *, killed: bool) -> Made:
    """Return the child's result, or raise the error for the way it ended."""
    doing = f"building {job.component}"
    if isinstance(last, Refused):
        raise _refused_error(last)
    ended = _ending(code)
    if code in _NO_MEMORY or (killed and ended == "was killed by SIGKILL"):
        raise ResourceError(f"{doing}: this machine ran out of memory, and the system ended the build; a build takes"
                            " about 3.5 times the weights: close other programs, or add swap")  # fmt: skip
    if code:
        raise EngineError(f"{doing}: its process {ended} ({_last_line(job.log)}); the log is {job.log}")
    if not isinstance(last, Made):
        raise EngineError(f"{doing}: its process ended without a result ({_last_line(job.log)}); the log is {job.log}")
    return last


def _ending(code: int) -> str:
    """Return how a process with this exit code ended: negative for a signal, a status of Windows from 0x80000000 on."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    if code >= 0x80000000:
        return f"was ended by {_STATUSES.get(code, 'Windows')} (0x{code:08X})"
    return f"ended with exit code {code}"


def _refused_error(refused: Refused) -> SdxlTrtError:
    kind = getattr(errors, refused.error, EngineError)
    known = isinstance(kind, type) and issubclass(kind, SdxlTrtError)
    return (kind if known else EngineError)(refused.message)


def _last_line(log: Path) -> str:
    """Return the last error line of the log, else its last line."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    marked = [line.removeprefix("[E] ") for line in lines if line.startswith(("[E]", "Fatal Python error"))]
    return (marked or lines or ["the log is empty"])[-1]
