"""Child processes on POSIX and on Windows: started with pipes, read with a time limit, ended with their children."""

__all__ = ["NEW_GROUP", "Family", "interpreter"]

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from typing import IO

from sdxl_trt.engines.host import windows
from sdxl_trt.engines.host.memory import process_memory

if sys.platform == "win32":
    NEW_GROUP = subprocess.CREATE_NEW_PROCESS_GROUP
else:
    NEW_GROUP = 0
"""Creation flags of a child that a Ctrl-C in a console of Windows should not reach; 0, as Popen requires, on POSIX."""
_CHUNK, _AHEAD = 1 << 16, 16
_PATIENCE = 0.05
"""Seconds between two looks whether the reading thread has ended."""


def interpreter() -> tuple[str, dict[str, str]]:
    """Return the command that starts this Python again, and the variables which that needs.

    In a virtual environment on Windows, sys.executable is a launcher that starts the interpreter as its child: its
    process id, its memory and its end are not the interpreter's. So the interpreter itself is started, and told which
    environment it belongs to, as multiprocessing does.
    """
    base = getattr(sys, "_base_executable", None)
    if sys.platform == "win32" and base and base != sys.executable:
        return base, {"__PYVENV_LAUNCHER__": sys.executable}
    return sys.executable, {}


class Family:
    """A process that was started with a pipe as its stdout, and the processes that it starts.

    On Windows all of them end when this process ends. On POSIX they end together if the process was started in a
    session of its own. `process` belongs to the caller, who waits for it and closes its pipes after `close`, which
    must be called in any case.
    """

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout  # noqa: S101 - a pipe, as required
        self.process = process
        self._job = _job(process.pid)
        self._leads = sys.platform != "win32" and _leads_group(process.pid)
        self._ended = False
        self._chunks: queue.Queue[bytes] = queue.Queue(_AHEAD)
        self._closing = threading.Event()
        # A thread, because select() takes only sockets on Windows.
        self._thread = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        self._thread.start()

    def read(self, seconds: float) -> bytes | None:
        """Return what the process has written, b"" at the end of its output, None if nothing arrives in `seconds`."""
        if self._ended:
            return b""
        try:
            chunk = self._chunks.get(timeout=seconds) if seconds > 0 else self._chunks.get_nowait()
        except queue.Empty:
            return None
        self._ended = not chunk
        return chunk

    def memory(self) -> dict[str, int]:
        """Return the memory of the process as `process_memory` does."""
        return process_memory(self.process.pid)

    def kill(self) -> None:
        """End the process and, as far as the system knows them, its children; nothing happens if they have ended."""
        if self._job is not None:
            with contextlib.suppress(OSError):
                self._job.end()
        if sys.platform != "win32" and self._leads:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()

    def close(self) -> None:
        """Stop reading, after the process has ended or was killed, and on Windows end what is left of its children."""
        if self._job is not None:
            with contextlib.suppress(OSError):
                self._job.close()
        self._closing.set()
        for _ in range(20):  # a process outside the group may hold the pipe open for ever
            with contextlib.suppress(queue.Empty):
                while True:
                    self._chunks.get_nowait()
            self._thread.join(_PATIENCE)
            if not self._thread.is_alive():
                return

    def _read(self, pipe: IO[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):  # the pipe is closed
            while chunk := os.read(pipe.fileno(), _CHUNK):
                if self._closing.is_set():
                    return
                self._chunks.put(chunk)
        self._chunks.put(b"")


def _job(pid: int) -> windows.Job | None:
    """Return a job around a process on Windows; None elsewhere, or if Windows refuses: then it is ended alone."""
    if sys.platform == "win32":
        with contextlib.suppress(OSError):
            return windows.Job(pid)
    return None


def _leads_group(pid: int) -> bool:
    return sys.platform != "win32" and os.getpgid(pid) == pid
