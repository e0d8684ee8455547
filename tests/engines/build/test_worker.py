"""The child's side of a build: its messages, its progress, and its end with the parent."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sdxl_trt.engines.build import worker
from sdxl_trt.engines.build.messages import BuildJob, Message, Refused
from sdxl_trt.engines.build.worker import Phases

FAKE = """
import sys
print("noise of an import")
sys.stdout.flush()
__version__ = "11.0"
class Runtime: pass
Runtime.__module__ = "tensorrt.x"
class ILogger:
    def __init__(self): pass
class Builder:
    def __init__(self, logger): {builder}
"""

# The binding's error if the library returns no builder.
NO_DRIVER = """
        logger.log(type("Severity", (), {"name": "ERROR"}), "CUDA initialization failure")
        raise TypeError("pybind11::init(): factory function returned nullptr")
"""


def _shares(calls: list[tuple[str, str, int]], clock: list[float] | None = None) -> list[tuple[str, float]]:
    told: list[tuple[str, float]] = []
    times = iter(clock or [float(i) for i in range(2 * len(calls))])
    phases = Phases(lambda phase, share: told.append((phase, round(share, 4))), lambda: next(times))
    for what, phase, number in calls:
        if what == "finish":
            phases.finish(phase)
        else:
            getattr(phases, what)(phase, number)
    return told


def test_an_inner_phase_is_a_part_of_a_step_of_the_outer_one() -> None:
    calls = [
        ("start", "outer", 4), ("step", "outer", 0), ("start", "inner", 2), ("step", "inner", 0),
        ("step", "inner", 1), ("finish", "inner", 0), ("step", "outer", 1), ("step", "outer", 3),
    ]  # fmt: skip
    assert _shares(calls) == [
        ("outer", 0), ("outer", 0.25), ("inner", 0.25), ("inner", 0.375), ("inner", 0.5), ("outer", 0.5), ("outer", 1),
    ]  # fmt: skip


def test_a_share_never_falls() -> None:
    """TensorRT restarts some phases, and ends an outer one before its inner ones."""
    calls = [
        ("start", "a", 2), ("step", "a", 0), ("finish", "a", 0), ("step", "a", 1), ("start", "b", 0), ("step", "b", 9),
        ("start", "a", 2),
    ]  # fmt: skip
    shares = [share for _, share in _shares(calls)]
    assert shares == sorted(shares) == [0, 0.5, 0.5, 1, 1]


def test_many_steps_are_few_messages() -> None:
    calls = [("start", "a", 100), *(("step", "a", i) for i in range(100))]
    clock = [0.0, 0.0, *(0.0015 * i for i in range(200))]
    assert len(_shares(calls, clock)) == 2


def _run(tmp_path: Path, builder: str, *, close: bool) -> tuple[int, list[Message], str]:
    """Run the worker with a substitute for TensorRT; with `close`, close its stdin after its first message."""
    modules = tmp_path / "modules/tensorrt"
    modules.mkdir(parents=True)
    (modules / "__init__.py").write_text(FAKE.format(builder=builder))
    job = BuildJob(
        component="unet", graph=tmp_path / "model.onnx", profiles=(), flavour="tensorrt", plan=tmp_path / "plan",
        log=tmp_path / "log",
    )  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(modules.parent)}
    (tmp_path / "plan").touch()
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-m", "sdxl_trt.engines.build.worker", str(tmp_path / "plan")]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, env=environment) as child:
            assert child.stdin
            assert child.stdout
            child.stdin.write(msgspec.json.encode(job, enc_hook=str) + b"\n")
            child.stdin.flush()
            lines = [child.stdout.readline()]
            if close:
                child.stdin.close()
            lines += child.stdout.read().splitlines()
            code = child.wait()
    return code, [msgspec.json.decode(line, type=Message) for line in lines], (tmp_path / "log").read_text()


def test_a_worker_ends_when_its_parent_is_gone(tmp_path: Path) -> None:
    """Its main thread is in a substitute for a build that never ends."""
    code, words, _ = _run(tmp_path, "import threading; threading.Event().wait()", close=True)
    assert code == 1
    assert not any(isinstance(word, Refused) for word in words)


@pytest.mark.parametrize(
    ("builder", "error", "said"),
    [
        ("raise ValueError('planted')", "EngineError", "building unet: ValueError: planted; the log is"),
        ("raise MemoryError", "ResourceError", "building unet: out of memory"),
        ("raise OSError(28, 'No space left on device')", "ResourceError", "building unet: No space left"),
        (NO_DRIVER, "EngineError", "building unet: CUDA initialization failure; the log is"),
    ],
)
def test_every_failure_is_one_of_our_errors(builder: str, error: str, said: str, tmp_path: Path) -> None:
    code, words, log = _run(tmp_path, builder, close=False)
    assert code == 0
    last = words[-1]
    assert isinstance(last, Refused)
    assert last.error == error
    assert said in last.message
    assert f"[E] {last.message}" in log


def test_noise_on_stdout_is_in_the_log(tmp_path: Path) -> None:
    _, words, log = _run(tmp_path, "raise MemoryError", close=False)
    assert log.startswith("noise of an import\n")
    assert len(words) == 2


def test_a_missing_tensorrt_is_named(tmp_path: Path) -> None:
    """The remedy is tested with `sdxl_trt.engines.backends.trt.api`; this tests only that the error arrives."""
    (tmp_path / "modules").mkdir()
    _, words, _ = _run(tmp_path / "modules", "pass\nraise ImportError('planted')", close=False)
    last = words[-1]
    assert isinstance(last, Refused)
    assert (last.error, "planted" in last.message) == ("IncompatibleError", True)


@pytest.mark.parametrize(("platform", "threads"), [("linux", ["_end_with_parent"]), ("win32", [])])
def test_no_thread_waits_on_stdin_on_windows(
    platform: str, threads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There it would block the loading of libraries that look at stdin; the parent's job object ends the worker."""
    job = BuildJob(component="unet", graph=tmp_path, profiles=(), flavour="tensorrt", plan=tmp_path, log=tmp_path)
    started: list[str] = []

    class Thread:
        def __init__(self, target: Callable[[], None], *, daemon: bool) -> None:
            started.append(target.__name__)

        def start(self) -> None:
            pass

    (tmp_path / "plan").touch()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(msgspec.json.encode(job, enc_hook=str) + b"\n")))
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "plan")])
    monkeypatch.setattr(worker, "_channel", lambda: lambda _: None)
    monkeypatch.setattr(worker, "make_plan", lambda job, file, say: file.write(b"plan"))
    monkeypatch.setattr(worker.threading, "Thread", Thread)
    monkeypatch.setattr(sys, "platform", platform)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert worker.main() == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert started == threads
    assert (tmp_path / "plan").read_bytes() == b"plan"
