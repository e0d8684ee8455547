"""The contestant's side of the protocol: every question has one answer, whatever happens."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sdxl_trt.benchmarks.contestants.protocol import Answer, Ask, Done, Ran, Ready, Task, serve


class Fake:
    """A contestant with two constant tasks."""

    def ready(self) -> Ready:
        return Ready(precision="fp32", import_seconds=1, load_seconds=2, tasks=("picture",))

    def task(self, ask: Ask) -> Task:
        if ask.task == "handoff":
            return lambda: Done(np.zeros(1), seconds=42.0)
        if ask.task != "picture":
            raise KeyError(ask.task)
        return lambda: Done(np.arange(3.0), {"base": 0.5})

    def peak_gpu(self) -> int | None:
        return 12


class Broken(Fake):
    def ready(self) -> Ready:
        raise MemoryError("of\n40 GB")


def _ask(*questions: Ask | bytes, make: Any = Fake) -> list[Answer]:
    lines = [one if isinstance(one, bytes) else msgspec.json.encode(one) for one in questions]
    written = io.BytesIO()
    serve(make, io.BytesIO(b"".join(line + b"\n" for line in lines)), written)
    return [msgspec.json.decode(line, type=Answer) for line in written.getvalue().splitlines()]


def test_a_whole_conversation(tmp_path: Path) -> None:
    kept = tmp_path / "kept.npy"
    asked = [Ask(do="prepare"), Ask(do="run", task="picture", keep=str(kept)), Ask(do="memory"), Ask(do="quit")]
    ready, ran, memory, bye = _ask(*asked, Ask(do="memory"))
    assert ready == Fake().ready()
    assert isinstance(ran, Ran)
    assert ran.seconds >= 0
    assert ran.stages == {"base": 0.5}
    np.testing.assert_array_equal(np.load(kept), np.arange(3.0))
    assert memory.peak_rss > 1 << 20
    assert memory.peak_gpu == 12
    assert type(bye).__name__ == "Bye"


def test_a_task_may_time_itself() -> None:
    assert _ask(Ask(do="prepare"), Ask(do="run", task="handoff"))[1] == Ran(seconds=42.0)


def test_failures_are_answers_and_the_next_question_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    questions = [Ask(do="run", task="picture"), b"{", b'{"do": "dance"}', Ask(do="prepare"), Ask(do="run", task="x")]
    answers = _ask(*questions, Ask(do="run", task="picture"))
    errors = [one.error for one in answers if type(one).__name__ == "Failed"]
    assert errors[0] == "run before prepare"
    assert errors[1].startswith("DecodeError: ")
    assert "dance" in errors[2]
    assert errors[3] == "KeyError: 'x'"
    assert len(errors) == 4
    assert isinstance(answers[-1], Ran)
    assert "Traceback" in capsys.readouterr().err


def test_a_contestant_that_cannot_be_prepared_answers_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    (failed,) = _ask(Ask(do="prepare"), make=Broken)
    assert failed.error == "MemoryError: of 40 GB"


def test_only_answers_are_written_to_stdout(tmp_path: Path) -> None:
    """The real entry point, with a spec that no contestant can run."""
    spec = dict.fromkeys(("name", "bundle", "base", "refiner", "inputs", "cache", "device", "prompt"), "")
    spec |= dict.fromkeys(("threads", "width", "height", "batch", "steps", "seed"), 1) | {"guidance": 1.0}
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(spec | {"handoff": None}))
    command = [sys.executable, "-m", "sdxl_trt.benchmarks.contestants", str(path), "onnxruntime"]
    questions = b'{"do":"prepare"}\n{"do":"memory"}\n'
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=questions, capture_output=True, check=True, timeout=60, env=environment)
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first["type"] == "failed"
    assert "Error" in first["error"]
    assert second == {"type": "failed", "error": "memory before prepare"}
