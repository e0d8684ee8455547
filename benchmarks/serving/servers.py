"""Servers as processes of their own: started on a free port, asked for their memory, and ended."""

__all__ = ["Server", "diffusers_server", "running", "trt_serve"]

import http.client
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from sdxl_trt.engines import SdxlTrtError

READY_WITHIN = 180.0
_POLL, _POLL_WITHIN = 0.1, 30.0
_END_WITHIN = 30.0


@dataclass(frozen=True)
class Server:
    """A server that runs: its port and process id."""

    port: int
    pid: int

    def get(self, path: str) -> bytes:
        """Return the body under `path`. Raises OSError if there is no answer."""
        return _get(self.port, path)[1]


def trt_serve(*words: str) -> list[str]:
    """Return the command of trt-serve on the embedded pair; {port} stands for its port."""
    return [sys.executable, "-m", "sdxl_trt.server.cli", "--port", "{port}", *words]


def diffusers_server(base: str, refiner: str) -> list[str]:
    """Return the command of the server of diffusers; {port} stands for its port."""
    module = "sdxl_trt.benchmarks.serving.diffusers_server"
    return [sys.executable, "-m", module, "--base", base, "--refiner", refiner, "--port", "{port}"]


@contextmanager
def running(command: Sequence[str], ready: str) -> Iterator[Server]:
    """Start `command`, wait until GET `ready` is answered with 200, and end it. Raises SdxlTrtError if it never is."""
    port = _free_port()
    words = [word.replace("{port}", str(port)) for word in command]
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(  # noqa: S603 - our own commands
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            _await(process, port, ready, output)
            yield Server(port, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(_END_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()


def _await(process: "subprocess.Popen[bytes]", port: int, ready: str, output: IO[bytes]) -> None:
    until = time.monotonic() + READY_WITHIN
    while process.poll() is None and time.monotonic() < until:
        try:
            if _get(port, ready)[0] == http.client.OK:
                return
        except OSError:
            pass
        time.sleep(_POLL)
    output.seek(0)
    last = output.read().decode(errors="replace").strip().rpartition("\n")[2]
    raise SdxlTrtError(f"a server did not start within {READY_WITHIN:.0f} s: {last}")


def _get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_POLL_WITHIN)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.HTTPException as exc:
        raise OSError(str(exc)) from exc
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
