"""trt-serve as a process of its own, on the embedded pair: the clients know nothing but its address."""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("TRT_SERVE_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
START_SECONDS = 60.0


def _status(url: str, data: bytes | None = None) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as exc:
        return exc.code
    except OSError:
        return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(log: Path, *options: str) -> Iterator[str]:
    """Run trt-serve with `options`; yield its address once it is ready, and stop it by SIGTERM."""
    address = f"http://127.0.0.1:{(port := _free_port())}"
    command = [PYTHON, "-m", "sdxl_trt.server.cli", "--port", str(port), *options]
    with log.open("wb") as file, subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file) as process:
        try:
            end = time.monotonic() + START_SECONDS
            while _status(f"{address}/health/ready") != 200:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.1)  # another process tells us in no other way
            yield address
        finally:
            process.terminate()
            process.wait(30)


Serve = Callable[..., str]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a server with options of its own; it is stopped at the end of the test."""
    with ExitStack() as stack:
        yield lambda *options: stack.enter_context(served(tmp_path / "serve.log", *options))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the server that all tests share."""
    with served(tmp_path_factory.mktemp("serve") / "serve.log") as address:
        yield address


@pytest.fixture(scope="session")
def mounted(server: str) -> Callable[[str], None]:
    """Skip a test whose API this server does not have."""

    def check(path: str) -> None:
        if _status(server + path) == 404:
            pytest.skip(f"the server has no {path}")

    return check
