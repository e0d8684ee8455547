"""Turns are taken in order, one at a time; a failing contestant is recorded and does not stop the others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sdxl_trt.benchmarks.contest.child import ContestantError
from sdxl_trt.benchmarks.contest.entries import contestant, measurement
from sdxl_trt.benchmarks.contest.roster import Entry
from sdxl_trt.benchmarks.contest.turns import PREPARE_LIMIT, Entrant, Plan, Turns, close, prepare, rotated, take_turns
from sdxl_trt.benchmarks.contestants.protocol import Ask, Memory, Ran, Ready, Spec
from sdxl_trt.benchmarks.measure.energy import Nvml

STEP = "base UNet step"
READY = Ready(precision="fp32", import_seconds=1, load_seconds=2, compile_seconds=3, versions={"torch": "9"},
              tasks=("picture", STEP))  # fmt: skip
SPEC = Spec(name="", bundle="", base="", refiner="", inputs="", cache="", device="cpu", threads=2, prompt="", width=64,
            height=32, batch=3, steps=4, handoff=0.8, guidance=5.0, seed=0)  # fmt: skip


class Script:
    """A player whose seconds are a function of the run's number; it logs who was asked what."""

    def __init__(self, name: str, log: list[tuple[str, str]], seconds: Callable[[int], float] = float) -> None:
        self.name, self._log, self._seconds = name, log, seconds
        self.runs, self.closed = 0, False

    def ask(self, ask: Ask, wanted: type[Any], limit: float) -> Any:
        assert not self.closed
        self._log.append((self.name, ask.task or ask.do))
        if wanted is Ready:
            return READY
        if wanted is Memory:
            return Memory(peak_rss=77, peak_gpu=None)
        self.runs += 1
        if ask.keep:
            np.save(ask.keep, np.full(3, float(len(self.name))))
        return Ran(seconds=self._seconds(self.runs), stages={"base": float(self.runs)})

    def close(self) -> None:
        self.closed = True


def _dies(when: int) -> Callable[[int], float]:
    def seconds(number: int) -> float:
        if number == when:
            raise ContestantError("run: it was killed by signal 9", gone=True)
        return 1.0

    return seconds


def _fails(when: int) -> Callable[[int], float]:
    def seconds(number: int) -> float:
        if number == when:
            raise ContestantError("out of memory")
        return 1.0

    return seconds


def _entrants(log: list[tuple[str, str]], **seconds: Callable[[int], float]) -> list[Entrant]:
    entrants = [Entrant(Entry(name, name.title()), Script(name, log, each)) for name, each in seconds.items()]
    for entrant in entrants:
        prepare(entrant, Nvml())
    log.clear()
    return entrants


def test_every_round_has_all_contestants_and_starts_with_the_next_one() -> None:
    log: list[tuple[str, str]] = []
    entrants = _entrants(log, a=lambda _: 5.0, b=lambda _: 5.0, c=lambda _: 5.0)
    turns = take_turns(entrants, Plan(Ask(do="run", task=STEP), runs=4, warmups=2), Nvml())
    order = "".join(name for name, _ in log)
    # Two warm-ups per contestant; the first timed run has an untimed one before it, later runs are long enough.
    assert order == "aabbcc" + "aabbcc" + "bca" + "cab" + "abc"
    assert {name: len(answers) for name, answers in turns.answers.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_short_run_is_preceded_by_an_untimed_one() -> None:
    log: list[tuple[str, str]] = []
    entrants = _entrants(log, a=lambda number: number / 100, b=lambda number: number / 100)
    turns = take_turns(entrants, Plan(Ask(do="run", task=STEP), runs=2), Nvml())
    assert "".join(name for name, _ in log) == "ab" + "aabb" + "bbaa"
    assert [one.seconds for one in turns.answers["a"]] == [0.03, 0.05]


def test_rounds_are_reported_and_the_seconds_are_in_their_order() -> None:
    said: list[str] = []
    entrants = _entrants([], a=lambda number: 10.0 + number)
    turns = take_turns(entrants, Plan(Ask(do="run", task="picture"), runs=3), Nvml(), said.append)
    assert said == [f"picture: round {number} of 3" for number in (1, 2, 3)]
    assert [one.seconds for one in turns.answers["a"]] == [12.0, 13.0, 14.0]
    found = measurement(entrants[0], "picture", turns, SPEC)
    assert found.seconds == (12.0, 13.0, 14.0)
    assert found.stages == {"base": 3.0}
    assert (found.pictures, found.rows, found.handoff, found.batch) == (3, None, 0.8, 3)


@pytest.mark.parametrize("when", [1, 2, 3, 4, 6])
def test_a_contestant_that_dies_is_out_and_the_others_continue(when: int) -> None:
    log: list[tuple[str, str]] = []
    entrants = _entrants(log, good=lambda _: 1.0, bad=_dies(when))
    turns = take_turns(entrants, Plan(Ask(do="run", task=STEP), runs=3), Nvml())
    assert {name: len(answers) for name, answers in turns.answers.items()} == {"good": 3}
    assert entrants[1].missing == entrants[1].not_run[STEP] == "run: it was killed by signal 9"
    assert entrants[1].player is None
    later = take_turns(entrants, Plan(Ask(do="run", task="picture"), runs=1), Nvml())
    assert list(later.answers) == ["good"]
    listed = contestant(entrants[1], "cpu")
    assert listed.missing == "run: it was killed by signal 9"
    assert listed.load_seconds == 2


def test_a_contestant_that_fails_a_task_still_gets_the_next() -> None:
    entrants = _entrants([], good=lambda _: 1.0, bad=_fails(2))
    plan = Plan(Ask(do="run", task=STEP), runs=3)
    assert list(take_turns(entrants, plan, Nvml()).answers) == ["good"]
    assert entrants[1].not_run == {STEP: "out of memory"}
    assert not entrants[1].missing
    picture = msgspec.structs.replace(plan.ask, task="picture")
    assert set(take_turns(entrants, Plan(picture, 1), Nvml()).answers) == {"good", "bad"}


def test_a_contestant_is_asked_only_for_its_tasks() -> None:
    log: list[tuple[str, str]] = []
    entrants = _entrants(log, a=float)
    assert take_turns(entrants, Plan(Ask(do="run", task="handoff"), 3), Nvml()).answers == {}
    assert log == []


def test_a_contestant_that_cannot_be_prepared_is_listed_with_the_reason() -> None:
    class Hanging(Script):
        def ask(self, ask: Ask, wanted: type[Any], limit: float) -> Any:
            raise ContestantError(f"prepare: no answer within {limit:g} s", gone=True)

    player = Hanging("slow", [])
    entrant = Entrant(Entry("slow", "Slow"), player)
    prepare(entrant, Nvml())
    assert player.closed
    listed = contestant(entrant, "cpu")
    assert listed.missing == f"prepare: no answer within {PREPARE_LIMIT:g} s"
    assert listed.load_seconds is None


def test_memory_is_asked_for_at_the_end() -> None:
    (entrant,) = _entrants([], a=float)
    player = entrant.player
    close(entrant)
    assert player.closed
    listed = contestant(entrant, "cpu")
    assert listed.peak_rss == 77
    assert listed.peak_gpu is None
    assert (listed.import_seconds, listed.load_seconds, listed.compile_seconds) == (1, 2, 3)


def test_outputs_are_compared(tmp_path: Path) -> None:
    entrants = _entrants([], one=float, three=float)
    plan = Plan(Ask(do="run", task=STEP), runs=1, outputs=tmp_path)
    turns = take_turns(entrants, plan, Nvml())
    assert turns.difference("three", "one") == pytest.approx(2 / 3)
    assert turns.difference("one", "one") is None
    assert turns.difference("one", "nobody") is None
    np.save(turns.outputs["three"], np.zeros(4))
    assert turns.difference("three", "one") == float("inf")


class Counting:
    """A fake NVML whose GPU spends 2 J between two readings."""

    def __init__(self) -> None:
        self.spent = 0

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, device: Any) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device: Any, out: Any) -> int:  # noqa: N802
        self.spent += 2000
        out._obj.value = self.spent
        return 0

    def nvmlDeviceGetMemoryInfo(self, device: Any, out: Any) -> int:  # noqa: N802
        out._obj.used = 1000 + self.spent
        return 0


def test_energy_is_of_the_timed_runs_and_memory_is_the_increase() -> None:
    entrants = [Entrant(Entry("a", "A"), Script("a", [], lambda _: 5.0))]
    nvml = Nvml(Counting())
    prepare(entrants[0], nvml)
    turns = take_turns(entrants, Plan(Ask(do="run", task=STEP), runs=3), nvml)
    assert turns.joules == {"a": 2.0}
    assert contestant(entrants[0], "cuda").peak_gpu == 12000


def test_without_a_gpu_nvml_returns_none() -> None:
    class Failing(Counting):
        def nvmlInit_v2(self) -> int:  # noqa: N802
            return 9

    nvml = Nvml(Failing())
    assert nvml.joules() is None
    assert nvml.used() is None


def test_no_contestants_give_no_turns() -> None:
    assert rotated([], 3) == []
    assert take_turns([], Plan(Ask(do="run", task=STEP), runs=2), Nvml()) == Turns()
