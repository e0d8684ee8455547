"""The protocol between trt-bench and a contestant: questions and answers, one JSON object per line.

A contestant is a long-running process, so that several can take turns, each with its own memory and libraries. An
error in it is an answer too. Every contestant's environment imports this module: it needs only msgspec and numpy.
"""

__all__ = ["TASKS", "Answer", "Ask", "Bye", "Failed", "Memory", "Ran", "Ready", "Spec", "Task", "serve"]

import time
import traceback
from collections.abc import Callable
from typing import BinaryIO, Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from sdxl_trt.engines.host import process_memory

TASKS = ("picture", "text encoders", "base UNet step", "refiner UNet step", "VAE decode", "handoff", "handoff resident")
Array = npt.NDArray[np.generic]


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of every contestant; only `name` differs. Sizes are in pixels, `inputs` is an .npz file.

    `bundle` is the exported folder; `base` and `refiner` are the checkpoints it was exported from, or "" if unknown
    or absent. `device` is "cpu" or "cuda". `cache` is a folder for files to reuse in later runs, such as exports.
    """

    name: str
    bundle: str
    base: str
    refiner: str
    inputs: str
    cache: str
    device: str
    threads: int
    prompt: str
    width: int
    height: int
    batch: int
    steps: int
    handoff: float | None
    guidance: float
    seed: int
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    calibration: tuple[str, ...] = ()
    """The prompts that contestants in 8 bits calibrate on."""


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A question. "run" takes a task, and may replace the spec's size, batch and handoff.

    `keep` is the .npy file to write the output to, or "".
    """

    do: Literal["prepare", "run", "memory", "quit"]
    task: str = ""
    keep: str = ""
    width: int | None = None
    height: int | None = None
    batch: int | None = None
    handoff: float | Literal["spec", "none"] = "spec"

    @property
    def varied(self) -> bool:
        """Whether it replaces any setting of the spec."""
        return self.handoff != "spec" or any(value is not None for value in (self.width, self.height, self.batch))


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """A contestant is ready: the seconds to prepare it, its tasks, and why it does not run the others."""

    precision: str
    import_seconds: float
    load_seconds: float
    compile_seconds: float | None = None
    versions: dict[str, str] = {}
    tasks: tuple[str, ...] = ()
    not_run: dict[str, str] = {}
    note: str = ""
    """What a reader must know of it, such as the parts that are not in its precision."""


class Ran(msgspec.Struct, frozen=True, kw_only=True, tag="ran"):
    """A task ran in `seconds`; `stages` are the seconds of its parts."""

    seconds: float
    stages: dict[str, float] = {}


class Memory(msgspec.Struct, frozen=True, kw_only=True, tag="memory"):
    """The process's peaks in bytes: resident memory, and GPU memory if known."""

    peak_rss: int
    peak_gpu: int | None = None


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A question failed, with the error in one line; the contestant keeps serving."""

    error: str


class Bye(msgspec.Struct, frozen=True, tag="bye"):
    """The last answer."""


Answer = Ready | Ran | Memory | Failed | Bye


class Done(msgspec.Struct, frozen=True):
    """The result of a task: its output, the seconds of its stages, and its total seconds if it times itself."""

    output: Array
    stages: dict[str, float] = {}
    seconds: float | None = None


Task = Callable[[], Done]


class Contestant(Protocol):
    """The work of a contestant. `ready` is called once, before any task."""

    def ready(self) -> Ready:
        """Import, load and compile; return the seconds each took."""

    def task(self, ask: Ask) -> Task:
        """Return the function to time for a question. Any exception is sent as the answer."""

    def peak_gpu(self) -> int | None:
        """Return the peak GPU memory in bytes, or None if unknown."""


def serve(make: Callable[[], Contestant], questions: BinaryIO, answers: BinaryIO) -> None:
    """Answer every line of `questions` until it ends or asks to quit; the first "prepare" calls `make`."""
    contestant: Contestant | None = None
    for line in questions:
        answer: Answer
        try:
            ask = msgspec.json.decode(line, type=Ask)
            if contestant is None and ask.do == "prepare":
                contestant = make()
            answer = _answer(contestant, ask)
        except Exception as exc:  # noqa: BLE001 - any error is the answer
            traceback.print_exc()
            answer = Failed(one_line(exc))
        answers.write(msgspec.json.encode(answer) + b"\n")
        answers.flush()
        if isinstance(answer, Bye):
            return


def _answer(contestant: Contestant | None, ask: Ask) -> Answer:
    if ask.do == "quit":
        return Bye()
    if contestant is None:
        return Failed(f"{ask.do} before prepare")
    if ask.do == "prepare":
        return contestant.ready()
    if ask.do == "memory":
        return Memory(peak_rss=peak_rss(), peak_gpu=contestant.peak_gpu())
    return _run(contestant, ask)


def _run(contestant: Contestant, ask: Ask) -> Ran:
    task = contestant.task(ask)
    started = time.perf_counter()
    done = task()
    seconds = time.perf_counter() - started
    if ask.keep:
        np.save(ask.keep, done.output)
    return Ran(seconds=seconds if done.seconds is None else done.seconds, stages=done.stages)


def one_line(exc: BaseException) -> str:
    """Return an exception as one short line."""
    text = " ".join(f"{type(exc).__name__}: {exc}".split())
    return text if len(text) <= 300 else f"{text[:300]}…"


def peak_rss() -> int:
    """Return this process's peak resident memory in bytes, without its parent's."""
    return process_memory()["VmHWM"]
