"""trt-serve --ray on a local cluster of two devices, and trt-serve without it, each as a process of its own."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
START_SECONDS = 180.0
PATIENT = dict.fromkeys(("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S"), "60")
"""The machine may be busy with other tests."""
SPLIT = ("--ray", "--ray-layout", "split", "--ray-devices", "2", "--provider", "ort-cpu")


@dataclass
class Server:
    """A server's address, its process, and how to ask it."""

    address: str
    process: "subprocess.Popen[bytes]"

    def ask(self, path: str, body: object = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Return the status, headers (in lower case) and body of an answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, {k.lower(): v for k, v in exc.headers.items()}, exc.read()

    def json(self, path: str, body: object = None) -> Any:
        """Return what an answer of status 200 says."""
        status, _, data = self.ask(path, body)
        assert status == 200, data
        return json.loads(data)

    def replica(self, name: str) -> int:
        """Return the process of a deployment's replica, among those of this server."""
        title = re.compile(rb"^ray::ServeReplica:sdxl-trt:" + name.encode() + rb"\b")
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdecimal() and title.match((folder / "cmdline").read_bytes()):
                    number = int(folder.name)
                    if self.process.pid in _ancestors(number):
                        return number
        raise AssertionError(f"no replica of {name}")


def _ancestors(number: int) -> list[int]:
    found = []
    while number > 1:
        number = int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(number)
    return found


def until(true: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Wait until something is `true`: another process tells us in no other way."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@contextlib.contextmanager
def served(log: Path, *options: str) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "sdxl_trt.server.cli", "--port", str(port), *options]
    env = {**os.environ, **PATIENT}
    with log.open("wb") as file, subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=env) as process:
        server = Server(f"http://127.0.0.1:{port}", process)

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                return server.ask("/health/ready")[0] == 200
            return False

        try:
            until(ready, log.read_text(), START_SECONDS)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@pytest.fixture(scope="session")
def one_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("one") / "log", "--provider", "ort-cpu") as server:
        yield server


@pytest.fixture(scope="session")
def ray_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("ray") / "log", *SPLIT, "--queue", "2") as server:
        yield server
    assert server.process.returncode == 0


@pytest.fixture(scope="session")
def kit() -> Any:
    """What tests need of this file, which they cannot import."""
    return SimpleNamespace(ROOT=ROOT, SPLIT=SPLIT, served=served, until=until)


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
