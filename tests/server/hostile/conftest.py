"""trt-serve as a process of its own, and clients that speak HTTP and websockets by hand."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

OWN, OTHER = "sk-MARKERKEY-own", "sk-MARKERKEY-other"
KEYS = [OWN, OTHER, *(f"sk-MARKERKEY-{number}" for number in range(250))]
MIB = 1 << 20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.hostile)


@dataclass
class Server:
    """A process that serves at `port`; it writes its files in the folder `temporary`, and `log` has its stderr."""

    process: "subprocess.Popen[str]"
    port: int
    temporary: Path
    log: Path
    out: Path
    warm: int = 0
    """The bytes in memory after the first picture."""

    def memory(self, name: str = "VmRSS") -> int:
        """Return the bytes that the process has in memory; "VmHWM" is the most since `forget_peak`."""
        found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1]) << 10

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def connect(self, seconds: float = 60.0) -> socket.socket:
        """Return a connection whose reads end after `seconds`."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def ask(self, method: str, path: str, body: bytes = b"", key: str = OWN, **headers: str) -> tuple[int, bytes]:
        """Return status and body of the answer to a whole request."""
        with self.connect() as connection:
            with suppress(OSError):  # the answer may come before the end of the body
                connection.sendall(head(method, path, key, Content_Length=str(len(body)), **headers) + body)
            return answer(connection)

    def open_socket(self, path: str = "/ws", key: str = OWN, **headers: str) -> tuple[socket.socket, int]:
        """Return a connection, and the status of the answer to its handshake: 101 if it is a websocket now."""
        connection = self.connect()
        more = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
                "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="} | headers  # fmt: skip
        connection.sendall(head("GET", path, key, **more))
        told = b""
        while b"\r\n\r\n" not in told:
            told += connection.recv(1)  # nothing of the frames that follow
        return connection, int(told.split()[1])

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


def head(method: str, path: str, key: str = OWN, **headers: str) -> bytes:
    """Return the head of a request; _ in names of headers is -."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {key}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """Return status and body of an answer; (0, b"") for a connection that was closed without one."""
    data = b""
    try:
        while b"\r\n\r\n" not in data:
            if not (part := connection.recv(65536)):
                return 0, data
            data += part
        lines, _, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", lines, re.IGNORECASE)
        while length is not None and len(body) < int(length[1]) and (part := connection.recv(65536)):
            body += part
    except ConnectionResetError:
        return (int(data.split()[1]), b"") if data else (0, b"")
    return int(lines.split()[1]), body


@pytest.fixture(scope="session")
def kit() -> ModuleType:
    """Return this file: keys, heads of requests, answers and frames."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Return a function that starts a server with keys and with spans on its stdout, and waits until it is ready."""
    with ExitStack() as stack:

        def started(*options: str) -> Server:
            folder = tmp_path_factory.mktemp("served")
            (folder / "keys").write_text("\n".join(KEYS))
            (folder / "temporary").mkdir()
            command = [sys.executable, "-m", "sdxl_trt.server.cli", "--port", "0", "--api-key-file",
                       str(folder / "keys"), "--traces", *options]  # fmt: skip
            environment = os.environ | {"TMPDIR": str(folder / "temporary"), "OTEL_TRACES_EXPORTER": "console"}
            out = stack.enter_context((folder / "out").open("w"))
            log = stack.enter_context((folder / "log").open("w"))
            process = subprocess.Popen(command, stdout=out, stderr=log, text=True, env=environment)
            stack.callback(process.wait)
            stack.callback(process.kill)
            address = None
            while address is None:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)  # another process tells us in no other way
                address = re.search(r"serving on http://127.0.0.1:(\d+)", (folder / "out").read_text())
            server = Server(process, int(address[1]), folder / "temporary", folder / "log", folder / "out")
            while server.ask("GET", "/health/ready")[0] != 200:
                assert process.poll() is None, (folder / "log").read_text()
            asked = b'{"prompt": "MARKERWORD", "size": "64x64", "steps": 2, "user": "MARKERWORD"}'
            assert server.ask("POST", "/v1/images/generations", asked)[0] == 200
            server.warm = server.memory()
            return server

        yield started


@pytest.fixture(scope="session")
def server(start: Callable[..., Server]) -> Server:
    """The server that all tests share."""
    return start()


def frames(connection: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Yield opcode and payload of each frame that a server sends, until the connection ends."""
    data = b""

    def take(count: int) -> bytes:
        nonlocal data
        while len(data) < count:
            if not (part := connection.recv(65536)):
                raise ConnectionResetError
            data += part
        taken, data = data[:count], data[count:]
        return taken

    with suppress(ConnectionResetError):
        while True:
            first, length = take(2)
            if length > 125:
                length = int.from_bytes(take(2 if length == 126 else 8), "big")
            yield first & 15, take(length)


def close_code(connection: socket.socket) -> int:
    """Return the code with which a server closes a websocket; 0 if it closes without one."""
    for opcode, payload in frames(connection):
        if opcode == 8:
            return int.from_bytes(payload[:2], "big")
    return 0


@pytest.fixture
def graph() -> dict[str, dict[str, object]]:
    """A graph of two steps, with the marker where a client's words stand."""

    def node(kind: str, **inputs: object) -> dict[str, object]:
        return {"class_type": kind, "inputs": inputs}

    return {
        "3": node("KSampler", seed=7, steps=2, cfg=7.0, sampler_name="euler", scheduler="normal", denoise=1.0,
                  model=["4", 0], positive=["6", 0], negative=["6", 0], latent_image=["5", 0]),
        "4": node("CheckpointLoaderSimple", ckpt_name="base"),
        "5": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "6": node("CLIPTextEncode", text="MARKERWORD", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="MARKERWORD", images=["8", 0]),
    }  # fmt: skip
