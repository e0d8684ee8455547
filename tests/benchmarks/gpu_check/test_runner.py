"""One process per check, under a time bound: crashes, hangs and the end of the time."""

import io
import math
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from sdxl_trt.benchmarks.gpu_check import child, runner
from sdxl_trt.benchmarks.gpu_check.checks import Check, Failed, Finding, Workplace, all_checks, make_workplace
from sdxl_trt.benchmarks.gpu_check.runner import ProcessRunner, run_checks
from sdxl_trt.benchmarks.measure.gpu_record import CheckResult, Figure, Outcome

LONG = 60.0


def _check(name: str = "one", needs: float = 1.0, most: float = LONG) -> Check:
    return Check(name, lambda _: Finding("seen"), needs, most)


class Clock:
    """A clock that a runner moves by the seconds that each check takes."""

    def __init__(self, *taken: float) -> None:
        self.now = 0.0
        self.allowed: list[float] = []
        self._taken = list(taken)

    def __call__(self) -> float:
        return self.now

    def run(self, check: Check, seconds: float, /) -> CheckResult:
        """Take the next time, but no longer than allowed."""
        self.allowed.append(seconds)
        wanted = self._taken.pop(0)
        taken = min(wanted, seconds)
        self.now += taken
        return CheckResult(check.name, "FAILED" if wanted > seconds else "ok", taken, "seen")


def _outcomes(checks: Sequence[Check], clock: Clock, seconds: float) -> tuple[list[CheckResult], list[str]]:
    told: list[str] = []
    return list(run_checks(checks, clock.run, seconds, told.append, clock)), told


def test_checks_that_do_not_fit_are_not_run_and_shorter_ones_still_are() -> None:
    clock = Clock(50, 8)
    results, told = _outcomes([_check("first"), _check("long", needs=30), _check("short", needs=5)], clock, 60)
    assert [(each.name, each.outcome) for each in results] == [("first", "ok"), ("long", "not run"), ("short", "ok")]
    assert results[1].seen == "out of time: it needs about 30 s, 10 s were left; give more --minutes"
    assert told[0] == "check 1 of 3, 1:00 min left: first"
    assert told[1] == "  ok after 50.0 s: seen"
    assert clock.allowed == [60, 10]


@pytest.mark.parametrize("outcome", ["skipped", "FAILED"])
def test_without_an_essential_check_the_others_of_its_provider_are_skipped(outcome: Outcome) -> None:
    ran: list[str] = []

    def run(check: Check, seconds: float, /) -> CheckResult:
        ran.append(check.name)
        return CheckResult(check.name, outcome, 0.0, "not installed")

    names = ("a: one", "b: one", "a: two", "a: three")
    checks = [Check(name, lambda _: Finding("seen"), essential=name == "a: one") for name in names]
    results = list(run_checks(checks, run, LONG, lambda _: None))
    assert ran == ["a: one", "b: one"]
    assert [(each.outcome, each.seen) for each in results[2:]] == [("skipped", "see “a: one”")] * 2


def test_a_check_that_runs_when_the_time_is_up_was_not_run() -> None:
    (result,), _ = _outcomes([_check()], Clock(100), 20)
    assert (result.outcome, result.seen) == ("not run", "out of time: it was ended after 20 s; give more --minutes")


def test_a_check_that_exceeds_its_own_limit_has_failed() -> None:
    results, _ = _outcomes([_check(most=15), _check("two")], Clock(100, 1), 40)
    assert [each.outcome for each in results] == ["FAILED", "ok"]


def _runner(code: str) -> ProcessRunner:
    return ProcessRunner(Path("folder"), command=(sys.executable, "-S", "-c", code))


def test_a_check_s_process_is_told_the_folder_and_the_name_and_its_result_is_read() -> None:
    code = """if 1:
        import sys
        print('{"name": "", "outcome": "ok", "seconds": 2.5, "seen": "%s", "figures": [["a", 1.5, "s"]]}'
              .replace('["a", 1.5, "s"]', '{"name": "a", "value": 1.5, "unit": "s"}') % " ".join(sys.argv[1:]))
    """
    result = _runner(code)(_check("a name"), LONG)
    assert result == CheckResult("a name", "ok", 2.5, "folder a name", (Figure("a", 1.5, "s"),))


@pytest.mark.parametrize(("code", "said"), [
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "its process was killed by signal 11: it said nothing"),
    ("import sys; print('bad\\n', file=sys.stderr); sys.exit(7)", "its process ended with exit code 7: bad"),
    ("print('no JSON')", "its process ended without a result"),
])  # fmt: skip
def test_a_crash_is_a_failure_of_one_check(code: str, said: str) -> None:
    result = _runner(code)(_check(), LONG)
    assert (result.outcome, result.seen) == ("FAILED", said)


def test_a_hang_ends_when_its_time_is_up() -> None:
    result = _runner("import os; os.read(os.pipe()[0], 1)")(_check(), 0.2)
    assert (result.outcome, result.seen) == ("FAILED", "it was killed after 0 s")


def test_a_hang_is_killed_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child starts another process, and both wait; the pipe to this test closes when neither is left."""
    pipe = tmp_path / "pipe"
    code = f"import os; os.fork(); file = open({str(pipe)!r}, 'wb', 0); file.write(b'x'); os.read(os.pipe()[0], 1)"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    def until_both_run(child: Any, seconds: float) -> bytes:
        started = b""
        while len(started) < 2:
            select.select([reader], [], [], LONG)
            started += os.read(reader, 2)
        raise subprocess.TimeoutExpired("child", seconds)

    monkeypatch.setattr(runner, "_read", until_both_run)
    result = _runner(code)(_check(), LONG)
    assert result.outcome == "FAILED"
    assert select.select([reader], [], [], LONG)[0] == [reader]
    assert os.read(reader, 1) == b"", "both ends are closed"
    os.close(reader)


def test_a_process_that_survives_its_kill_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that waits in a driver ends at no signal; here none is sent."""
    monkeypatch.setattr(runner.os, "killpg", lambda *_: None)
    monkeypatch.setattr(runner, "KILL_SECONDS", 0.05)
    started: list[Any] = []
    read = runner._read
    monkeypatch.setattr(runner, "_read", lambda child, seconds: (started.append(child), read(child, seconds))[1])
    result = _runner("import os; os.read(os.pipe()[0], 1)")(_check(), 0.05)
    started[0].kill()
    started[0].wait()
    assert (result.outcome, result.seen) == ("FAILED", "it was killed after 0 s and did not end")


def test_figures_that_are_no_number_do_not_lose_the_message() -> None:
    """JSON has no NaN: msgspec writes null, which is not a float when it is read."""
    figures = tuple(Figure(str(value), value) for value in (math.nan, math.inf, -math.inf, 1.5))

    def fail(_: Workplace) -> Finding:
        raise Failed(Finding("the cosine is nan", figures))

    workplace = cast(Workplace, SimpleNamespace(without_paths=str))
    result = child.run_check(Check("one", fail), workplace)
    assert msgspec.json.decode(msgspec.json.encode(result), type=CheckResult) == result
    assert (result.outcome, result.seen, result.figures) == ("FAILED", "the cosine is nan", (Figure("1.5", 1.5),))


def test_a_child_ends_when_its_stdin_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(child.os, "_exit", codes.append)
    monkeypatch.setattr(child.sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    child._end_with_parent()
    assert codes == [1]


def test_a_real_check_runs_in_a_real_process(tmp_path: Path) -> None:
    make_workplace(tmp_path, ours=True)
    (check,) = [each for each in all_checks() if each.name == "tensorrt-rtx: the bindings import"]
    result = ProcessRunner(tmp_path)(check, LONG)
    assert result.name == check.name
    assert result.outcome in ("ok", "skipped")
    assert "TensorRT" in result.seen or "pip install 'sdxl-trt[tensorrt-rtx]'" in result.seen


def test_facts_are_asked_in_a_process_of_its_own() -> None:
    assert _runner('print(\'{"GPU": "one"}\')').facts() == {"GPU": "one"}
    killed = _runner(f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})").facts()
    assert killed == {"GPU": "its process was killed by signal 9: it said nothing"}
    assert _runner("print(7)").facts() == {"GPU": "its process ended without a result"}
