"""Contestants take turns, run by run, so that drift of the machine affects all of them alike."""

__all__ = ["Entrant", "Plan", "Player", "Turns", "close", "prepare", "rotated", "take_turns"]

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import numpy as np

from sdxl_trt.benchmarks.contest.child import ContestantError
from sdxl_trt.benchmarks.contest.roster import Entry
from sdxl_trt.benchmarks.contestants import Ask, Memory, Ran, Ready
from sdxl_trt.benchmarks.measure import Nvml, Say

PREPARE_LIMIT = 3600.0
RUN_LIMIT = 3600.0
CLOSE_LIMIT = 60.0
LONG = 2.0
"""Runs of at least this many seconds need no warm-up: cold caches and idle threads at the start do not matter."""
T = TypeVar("T", bound=msgspec.Struct)


class Player(Protocol):
    """A contestant's process."""

    def ask(self, ask: Ask, wanted: type[T], limit: float) -> T:
        """Return the answer. Raises ContestantError."""

    def close(self) -> None:
        """End the process."""


@dataclass
class Entrant:
    """A contestant's state during the contest: its process, its answers, and why it or a task of it did not run."""

    entry: Entry
    player: Player | None = None
    ready: Ready | None = None
    missing: str = ""
    not_run: dict[str, str] = field(default_factory=dict)
    memory: Memory | None = None
    command: tuple[str, ...] = ()
    gpu_before: int = 0
    gpu_peak: int | None = None

    @property
    def name(self) -> str:
        """Return the contestant's name."""
        return self.entry.name

    def leave(self, reason: str) -> None:
        """End the process and record why the contestant is out."""
        self.end()
        self.missing = reason

    def end(self) -> None:
        """End the process, if there is one."""
        if self.player is not None:
            self.player.close()
        self.player = None

    def plays(self, task: str) -> bool:
        """Whether it can run `task`."""
        return self.player is not None and self.ready is not None and task in self.ready.tasks


@dataclass(frozen=True)
class Plan:
    """A task, the numbers of warm-ups and timed runs, and the folder for its outputs or None."""

    ask: Ask
    runs: int
    warmups: int = 1
    outputs: Path | None = None


@dataclass
class Turns:
    """A task's results by contestant: answers in the order of the rounds, the GPU's joules per run, output files.

    All contestants have the same number of answers; one that failed in any round has none.
    """

    answers: dict[str, list[Ran]] = field(default_factory=dict)
    joules: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, Path] = field(default_factory=dict)

    def difference(self, name: str, reference: str) -> float | None:
        """Return the largest difference from `reference` as a share of its largest value; None without two outputs."""
        if name == reference or not {name, reference} <= self.outputs.keys():
            return None
        one, other = (np.load(self.outputs[each]).astype(np.float64) for each in (name, reference))
        if one.shape != other.shape:
            return float("inf")
        return float(np.abs(one - other).max() / max(np.abs(other).max(), np.finfo(np.float64).tiny))


def prepare(entrant: Entrant, nvml: Nvml) -> None:
    """Prepare one contestant while no other runs; if that fails, it leaves with the reason."""
    if entrant.player is None:
        return
    entrant.gpu_before = nvml.used() or 0
    try:
        entrant.ready = entrant.player.ask(Ask(do="prepare"), Ready, PREPARE_LIMIT)
    except ContestantError as exc:
        entrant.leave(str(exc))
        return
    entrant.not_run |= entrant.ready.not_run
    _watch_memory(entrant, nvml)


def take_turns(entrants: Sequence[Entrant], plan: Plan, nvml: Nvml, say: Say = lambda _: None) -> Turns:
    """Run a task round by round on all contestants that have it, one at a time; each round starts with the next one.

    A run shorter than LONG is preceded by an untimed one if others have used the caches in between. A failure is
    recorded in the contestant's `not_run`; a contestant whose process is lost leaves.
    """
    task, turns = plan.ask.task, Turns()
    able = [entrant for entrant in entrants if entrant.plays(task)]
    for entrant in list(able):
        keep = "" if plan.outputs is None else str(plan.outputs / f"{entrant.name} {task}.npy")
        first = msgspec.structs.replace(plan.ask, keep=keep)
        if all(_run(entrant, ask) for ask in [first, *[plan.ask] * plan.warmups][: plan.warmups]):
            turns.answers[entrant.name] = []
            if Path(keep).is_file():
                turns.outputs[entrant.name] = Path(keep)
    for number in range(plan.runs):
        say(f"{task}: round {number + 1} of {plan.runs}")
        for entrant in rotated([one for one in able if one.name in turns.answers], number):
            _turn(entrant, plan.ask, turns, nvml)
    turns.joules = {name: spent / plan.runs for name, spent in turns.joules.items()}
    return turns


def _turn(entrant: Entrant, ask: Ask, turns: Turns, nvml: Nvml) -> None:
    answers = turns.answers[entrant.name]
    last = answers[-1].seconds if answers else 0.0
    disturbed = len(turns.answers) > 1 and last < LONG
    if disturbed and _run(entrant, ask) is None:
        del turns.answers[entrant.name]
        return
    before = nvml.joules()
    ran = _run(entrant, ask)
    after = nvml.joules()
    if ran is None:
        del turns.answers[entrant.name]
        return
    answers.append(ran)
    if before is not None and after is not None:
        turns.joules[entrant.name] = turns.joules.get(entrant.name, 0.0) + after - before
    _watch_memory(entrant, nvml)


def _run(entrant: Entrant, ask: Ask) -> Ran | None:
    """Return the answer to a run, or None if it failed."""
    if entrant.player is None:
        return None
    try:
        return entrant.player.ask(ask, Ran, RUN_LIMIT)
    except ContestantError as exc:
        entrant.not_run[f"{ask.task} at other settings" if ask.varied else ask.task] = str(exc)
        if exc.gone:
            entrant.leave(str(exc))
        return None


def _watch_memory(entrant: Entrant, nvml: Nvml) -> None:
    used = nvml.used()
    if used is not None:
        entrant.gpu_peak = max(entrant.gpu_peak or 0, used - entrant.gpu_before)


def close(entrant: Entrant) -> None:
    """Ask a contestant for its memory use and end it; its measurements are kept."""
    if entrant.player is None:
        return
    try:
        entrant.memory = entrant.player.ask(Ask(do="memory"), Memory, CLOSE_LIMIT)
    except ContestantError as exc:
        entrant.not_run["memory"] = str(exc)
    entrant.end()


def rotated(entrants: Sequence[Entrant], number: int) -> list[Entrant]:
    """Return `entrants` rotated so that round `number` starts with the next one."""
    first = number % len(entrants) if entrants else 0
    return [*entrants[first:], *entrants[:first]]
