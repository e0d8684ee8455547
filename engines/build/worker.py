"""The process that builds one plan: ``python -m sdxl_trt.engines.build.worker FILE``, started by `engines.build`.

It reads a BuildJob as one line of JSON from stdin and writes the plan to FILE, which exists. Stdout carries one message
per line (`messages.Message`); all other output to stdout goes to stderr, which is the build log. It ends with its
parent: when stdin closes, the process exits, whatever TensorRT is doing. On Windows the parent's job object ends it.
"""

__all__ = ["Phases", "main"]

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from sdxl_trt.engines.backends.trt import library_version, make_logger, tensorrt_module
from sdxl_trt.engines.build.builder import PlanFile, add_profiles, configure, memory_of, write_plan
from sdxl_trt.engines.build.messages import BuildJob, BuildPhase, Made, Message, Refused
from sdxl_trt.engines.build.network import BuildLog, allow_decomposition, parse_error, parse_graph
from sdxl_trt.engines.build.timing import TimingCache
from sdxl_trt.engines.errors import ResourceError, SdxlTrtError, explain_os_error

INTERVAL = 0.1
"""Minimum seconds between two progress messages: the builder takes thousands of steps."""
Say = Callable[[Message], None]


class Phases:
    """Combines TensorRT's nested phases into one share: an inner phase subdivides the current step of its outer one.

    Called from the builder's threads in any order: steps of a finished phase are ignored.
    """

    def __init__(self, say: Callable[[str, float], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._open: dict[str, tuple[int, int]] = {}
        self._share = 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def start(self, phase: str, steps: int) -> None:
        """Enter `phase`, which takes `steps` steps."""
        with self._lock:
            self._open[phase] = (0, max(1, steps))
            self._report(phase)

    def step(self, phase: str, step: int) -> None:
        """Record that step `step` of `phase`, counted from 0, is done."""
        with self._lock:
            if phase in self._open:
                steps = self._open[phase][1]
                self._open[phase] = (min(step + 1, steps), steps)
                self._report(phase)

    def finish(self, phase: str) -> None:
        """Leave `phase`."""
        with self._lock:
            self._open.pop(phase, None)

    def _report(self, phase: str) -> None:
        share, part = 0.0, 1.0
        for done, steps in self._open.values():
            share += part * done / steps
            part /= steps
        self._share = min(1.0, max(self._share, share))
        if self._clock() >= self._next:
            self._next = self._clock() + INTERVAL
            self._say(phase, self._share)


def make_plan(job: BuildJob, file: BinaryIO, say: Say) -> Made:
    """Build the plan of `job` into `file` and return its figures; `say` receives the phases. Raises an SdxlTrtError."""
    say(BuildPhase(phase="loading TensorRT"))
    trt = tensorrt_module(job.flavour)
    log = BuildLog(sys.stderr, layers=job.list_layers)
    rank = "" if job.lora_rank is None else f", LoRA rank {job.lora_rank}"
    what = f"{job.component}: {job.flavour} {library_version(trt)}, {job.flags}, profiles {job.profiles}{rank}"
    log.note("INFO", what)
    # Logger and monitor must outlive the builder: all of them stay until this function returns.
    logger = make_logger(trt, log.note)
    builder = _builder(trt, logger, log, job)
    say(BuildPhase(phase="parsing"))
    # Parsed by its bare name: the log stays in the bundle and must not contain this machine's folders.
    os.chdir(job.graph.parent)
    parsed = parse_graph(trt, builder, logger, Path(job.graph.name))
    refusal = parse_error(trt, parsed, log, job.graph)
    if refusal is not None:
        raise refusal
    layers = parsed.network.num_layers
    allow_decomposition(trt, parsed.network)
    config = configure(trt, builder, job.flavour, job.flags)
    if job.list_layers:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # without it a layer's types are not told
    # It too must outlive the build.
    timing = TimingCache(config, job.timing_cache, log, shared=job.shared_cache) if job.timing_cache else None
    add_profiles(builder, config, parsed.network, job.profiles, job.lora_rank)
    monitor = _monitor(trt, Phases(lambda phase, share: say(BuildPhase(phase=phase, share=share))))
    config.progress_monitor = monitor
    say(BuildPhase(phase="building"))
    plan = PlanFile(file)
    log.errors.clear()  # a timing cache that does not fit is not an error
    if not write_plan(trt, builder, parsed.network, config, plan):
        raise log.failure(_doing(job), f"the log is {job.log}")
    file.flush()
    if timing is not None:
        timing.save()
    memory = memory_of(trt, logger, log, file, job.flags, profiles=len(job.profiles))
    figures = msgspec.structs.asdict(memory)
    return Made(
        size=plan.size,
        sha256=plan.sha256,
        chunks=plan.chunks,
        parse_seconds=parsed.seconds,
        layers=layers,
        **figures,
    )


def _builder(trt: Any, logger: Any, log: BuildLog, job: BuildJob) -> Any:
    try:
        return trt.Builder(logger)
    except TypeError as exc:  # the library returned none, for lack of a driver or a GPU, and has logged why
        raise log.failure(_doing(job), f"the log is {job.log}") from exc


def _doing(job: BuildJob) -> str:
    return f"building {job.component}"


def _monitor(trt: Any, phases: Phases) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc] # the base is known at run time only
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:  # noqa: ARG002
            phases.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.step(phase_name, step)
            return True  # continue: a build is stopped by killing the process

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


def main() -> int:
    """Run the job on stdin and return the exit code: 0 if the parent received a result or a refusal."""
    # Ctrl-C in a terminal reaches the parent too, which kills this process and cleans up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    say = _channel()
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=BuildJob, dec_hook=lambda kind, value: kind(value))
    if sys.platform != "win32":  # there, a thread that waits on stdin blocks the loading of DLLs that look at it
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with Path(sys.argv[1]).open("r+b") as file:
            say(make_plan(job, file, say))
    except Exception as exc:  # noqa: BLE001 - the boundary: the parent gets one line, the log the rest
        if not isinstance(exc, SdxlTrtError):
            traceback.print_exc()
        refusal = _refusal(exc, job)
        sys.stderr.write(f"[E] {refusal.message}\n")
        say(refusal)
    return 0


def _channel() -> Say:
    """Return the function that sends messages on stdout; redirect all other writes to stdout into the log."""
    messages = os.dup(1)
    os.dup2(2, 1)
    lock = threading.Lock()

    def say(message: Message) -> None:
        line = msgspec.json.encode(message) + b"\n"
        with lock:
            os.write(messages, line)

    return say


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def _refusal(exc: Exception, job: BuildJob) -> Refused:
    doing = _doing(job)
    if isinstance(exc, OSError):
        exc = explain_os_error(exc, doing)
    if isinstance(exc, MemoryError):
        exc = ResourceError(f"{doing}: out of memory; close other programs, or build for smaller sizes")
    if isinstance(exc, SdxlTrtError):
        return Refused(error=type(exc).__name__, message=str(exc))
    return Refused(error="EngineError", message=f"{doing}: {type(exc).__name__}: {exc}; the log is {job.log}")


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # The kernel reclaims gigabytes faster than destructors free them, and nothing else is left to do.
    os._exit(code)
