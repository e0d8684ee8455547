"""Child processes: what they write is read with a time limit, and they end with their children."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sdxl_trt.engines.host import Family, children, interpreter, windows

LIMIT = 20.0
# It starts a process that holds the pipe open, says so, and waits, as that does.
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"])
sys.stdout.write(f"{child.pid}\\n")  # one write, also where PYTHONUNBUFFERED is set
sys.stdout.flush()
child.wait()
"""


@contextlib.contextmanager
def _started(code: str, *, session: bool = True) -> Iterator[Family]:
    command = [sys.executable, "-S", "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=session) as process:
        family = Family(process)
        try:
            yield family
        finally:
            family.kill()
            family.close()


def test_output_arrives_as_it_is_written_and_ends_with_the_process() -> None:
    with _started("print(input(), end='', flush=True); input()") as family:
        assert family.read(0) is None
        assert family.process.stdin
        family.process.stdin.write(b"one\n")
        family.process.stdin.flush()
        assert family.read(LIMIT) == b"one"
        assert family.read(0) is None
        assert family.memory()["VmRSS"] > 1 << 20
        family.process.stdin.close()
        assert family.read(LIMIT) == b""
        assert family.read(LIMIT) == b""


def test_the_children_of_a_process_end_with_it() -> None:
    with _started(PARENT) as family:
        assert int(family.read(LIMIT) or b"") > 1
        family.kill()
        assert family.process.wait(LIMIT) == -signal.SIGKILL
        assert family.read(LIMIT) == b""  # the last one that held the pipe has ended


def test_a_process_in_the_session_of_its_parent_is_killed_alone() -> None:
    with _started("input()", session=False) as family:
        family.kill()
        assert family.process.wait(LIMIT) == -signal.SIGKILL


def test_more_output_than_is_read_ends_with_the_process() -> None:
    with _started("import sys\nwhile True: sys.stdout.write('x' * (1 << 16))") as family:
        assert family.read(LIMIT)
        family.kill()
        family.close()
        assert not family._thread.is_alive()


class _Job:
    """A job that ends its process by a signal of its own."""

    def __init__(self, pid: int) -> None:
        self.pid, self.closed = pid, 0

    def end(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def close(self) -> None:
        self.closed += 1


def test_a_job_ends_the_processes_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "Job", _Job)
    with _started("input()") as family:
        monkeypatch.setattr(sys, "platform", "win32")
        job = children._job(family.process.pid)
        assert isinstance(job, _Job)
        monkeypatch.setattr(family, "_job", job)
        monkeypatch.setattr(family.process, "kill", lambda: None)
        family.kill()
        assert family.process.wait(LIMIT) == -signal.SIGTERM
        family.close()
        assert job.closed == 1
        monkeypatch.undo()


def test_a_process_without_a_job_is_killed_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError

    monkeypatch.setattr(windows, "Job", refuse)
    with _started("input()") as family:
        monkeypatch.setattr(sys, "platform", "win32")
        assert children._job(family.process.pid) is None
        family.kill()
        assert family.process.wait(LIMIT) == -signal.SIGKILL
        monkeypatch.undo()


def test_the_interpreter_of_an_environment_on_windows_is_started_without_its_launcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "_base_executable", r"C:\Python\python.exe", raising=False)
    assert interpreter() == (sys.executable, {})
    monkeypatch.setattr(sys, "platform", "win32")
    assert interpreter() == (r"C:\Python\python.exe", {"__PYVENV_LAUNCHER__": sys.executable})
    monkeypatch.setattr(sys, "_base_executable", sys.executable)
    assert interpreter() == (sys.executable, {})
