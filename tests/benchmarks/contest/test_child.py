"""A contestant's process with every kind of fault: each is an error, and none makes the caller wait forever."""

import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdxl_trt.benchmarks.contest.child import Child, ContestantError
from sdxl_trt.benchmarks.contestants.protocol import Ask, Memory, Ran, Ready

LIMIT = 20.0
RUN = Ask(do="run", task="picture")
# A contestant in a few lines, without libraries: the code that answers a question is in its arguments.
FAKE = """
import json, os, sys
for line in sys.stdin:
    ask = json.loads(line)
    if ask["do"] == "quit":
        print(json.dumps({"type": "bye"}), flush=True)
        break
    exec(sys.argv[1])
"""
RAN = 'print(json.dumps({"type": "ran", "seconds": 0.25, "stages": {"base": 0.2}}), flush=True)'


def _child(answer: str) -> Child:
    return Child([sys.executable, "-S", "-c", FAKE, answer], {"PYTHONUNBUFFERED": "1"})


@pytest.fixture
def gone() -> Iterator[list[Child]]:
    """Return a list for processes that must all have ended after the test."""
    children: list[Child] = []
    yield children
    for child in children:
        child.close()
        assert child._process.poll() is not None


def test_questions_are_answered_one_after_the_other() -> None:
    with _child(RAN) as child:
        for _ in range(3):
            assert child.ask(RUN, Ran, LIMIT) == Ran(seconds=0.25, stages={"base": 0.2})
    assert child._process.returncode == 0


def test_a_failure_is_an_answer_and_the_contestant_keeps_serving() -> None:
    failing = 'print(json.dumps({"type": "failed", "error": "no\\nmemory"}), flush=True)'
    with _child(f"({failing}) if ask['task'] else ({RAN})") as child:
        with pytest.raises(ContestantError, match=r"^no memory$") as caught:
            child.ask(RUN, Ran, LIMIT)
        assert not caught.value.gone
        assert child.ask(Ask(do="memory"), Ran, LIMIT).seconds == 0.25


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("sys.exit(3)", "run picture: it ended with exit code 3"),
        ("sys.stderr.write('a\\nout of luck\\n'); sys.exit(1)", r"exit code 1 \(out of luck\)"),
        ("os.kill(os.getpid(), 9)", "run picture: it was killed by signal 9"),
        ("print('Loading pipeline', flush=True)", "answered b'Loading pipeline', which is not a valid answer"),
        ("os.write(1, b'\\xff\\xfe\\n')", "which is not a valid answer"),
        ("""print('{"type": "ran"}', flush=True)""", "which is not a valid answer"),
        ("""print('{"type": "ran", "seconds": "long"}', flush=True)""", "which is not a valid answer"),
        ("""print('{"type": "memory", "peak_rss": 1}', flush=True)""", "answered run with Memory"),
        ("os.write(1, b'x' * (1 << 21))", "a line that does not end"),
    ],
)
def test_a_contestant_that_breaks_the_protocol_is_ended(answer: str, reason: str, gone: list[Child]) -> None:
    child = _child(answer)
    gone.append(child)
    with pytest.raises(ContestantError, match=reason) as caught:
        child.ask(RUN, Ran, LIMIT)
    assert caught.value.gone
    assert "\n" not in str(caught.value)
    with pytest.raises(ContestantError):
        child.ask(RUN, Ran, LIMIT)


def test_a_hanging_contestant_is_killed_with_its_children(tmp_path: Path, gone: list[Child]) -> None:
    """Its child holds a pipe open, which reaches its end only when the child is killed too."""
    os.mkfifo(tmp_path / "held")
    reader = os.open(tmp_path / "held", os.O_RDONLY | os.O_NONBLOCK)
    held = f"os.open({str(tmp_path / 'held')!r}, os.O_WRONLY)"
    started = f"import subprocess; subprocess.Popen(['sleep', '600'], pass_fds=[{held}]); {RAN}; sys.stdin.read()"
    child = _child(started)
    gone.append(child)
    try:
        assert child.ask(RUN, Ran, LIMIT).seconds == 0.25
        with pytest.raises(ContestantError, match=r"^run picture: no answer within 0 s$") as caught:
            child.ask(RUN, Ran, 0.0)
        assert caught.value.gone
        assert select.select([reader], [], [], LIMIT)[0] == [reader]
        assert os.read(reader, 1) == b""
    finally:
        os.close(reader)


def test_a_missing_command_is_an_error() -> None:
    with pytest.raises(ContestantError, match="/nowhere/python does not start: No such file") as caught:
        Child(["/nowhere/python"])
    assert caught.value.gone


def test_environment_variables_are_set_only_for_the_contestant() -> None:
    answer = """print(json.dumps({"type": "ran", "seconds": float(os.environ["OMP_NUM_THREADS"])}), flush=True)"""
    with Child([sys.executable, "-S", "-c", FAKE, answer], {"OMP_NUM_THREADS": "7"}) as child:
        assert child.ask(RUN, Ran, LIMIT).seconds == 7
    assert os.environ.get("OMP_NUM_THREADS") != "7"


def test_an_interrupt_leaves_no_process() -> None:
    child = _child("sys.stdin.read()")
    with pytest.raises(KeyboardInterrupt), child:
        raise KeyboardInterrupt
    assert child._process.poll() is not None


def test_an_answer_of_the_wrong_kind_is_an_error() -> None:
    with _child("""print(json.dumps({"type": "memory", "peak_rss": 5}), flush=True)""") as child:
        assert child.ask(Ask(do="memory"), Memory, LIMIT).peak_rss == 5
        with pytest.raises(ContestantError, match="answered prepare with Memory"):
            child.ask(Ask(do="prepare"), Ready, LIMIT)
