"""Connections whose client does not send its request, or does not read what is answered; time is the test's."""

import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from sdxl_trt.server.http import Connection, Socket
from sdxl_trt.server.http.connections import HEAD_SECONDS, READ_SECONDS, SLOWEST

HEAD = b"GET /health/live HTTP/1.1\r\nHost: a\r\n"
UPGRADE = (b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
           b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")  # fmt: skip


@dataclass
class Timer:
    """A call that is due at a time of the test's clock."""

    at: float
    call: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Loop:
    """The event loop, but with a clock that only `pass_` moves."""

    real: asyncio.AbstractEventLoop
    now: float = 0.0
    timers: list[Timer] = field(default_factory=list)

    def call_later(self, delay: float, call: Callable[..., None], *arguments: Any) -> Timer:
        self.timers.append(Timer(self.now + delay, lambda: call(*arguments)))
        return self.timers[-1]

    def time(self) -> float:
        return self.now

    def create_task(self, *arguments: Any, **more: Any) -> Any:
        return self.real.create_task(*arguments, **more)

    def pass_(self, seconds: float) -> None:
        until = self.now + seconds
        while due := [timer for timer in self.timers if timer.at <= until and not timer.cancelled]:
            first = min(due, key=lambda timer: timer.at)
            self.timers.remove(first)
            self.now = first.at
            first.call()
        self.now = until


@dataclass
class Transport:
    """What a connection writes; `waiting` are the bytes that its client has not read."""

    written: bytes = b""
    waiting: int = 0
    closed: bool = False
    aborted: bool = False
    protocol: Any = None

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.closed or self.aborted

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_extra_info(self, name: str) -> Any:
        return None

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        await receive()
        await receive()
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


Use = Callable[[Connection, Transport, Loop], Any]


@pytest.fixture
def connected() -> Callable[[Use], None]:
    def run(use: Use) -> None:
        async def main() -> None:
            loop = Loop(asyncio.get_running_loop())
            config = uvicorn.Config(app, http=Connection, ws=Socket, lifespan="off", log_config=None)
            config.load()
            connection, transport = Connection(config, ServerState(), {}, loop), Transport()
            connection.connection_made(transport)
            await use(connection, transport, loop)

        asyncio.run(main())

    return run


async def done(connection: Connection) -> None:
    await asyncio.gather(*connection.tasks)


def test_a_head_that_is_sent_byte_by_byte_is_refused_in_time(connected: Any) -> None:
    async def use(connection: Connection, transport: Transport, loop: Loop) -> None:
        for byte in HEAD[: int(HEAD_SECONDS)]:
            assert not transport.closed
            connection.data_received(bytes([byte]))
            loop.pass_(1)
        assert transport.closed
        assert transport.written.startswith(b"HTTP/1.1 408 ")

    connected(use)


def test_a_connection_that_says_nothing_is_closed_without_an_answer(connected: Any) -> None:
    async def use(connection: Connection, transport: Transport, loop: Loop) -> None:
        loop.pass_(HEAD_SECONDS)
        assert transport.closed
        assert transport.written == b""

    connected(use)


def test_a_second_head_has_its_own_time(connected: Any) -> None:
    async def use(connection: Connection, transport: Transport, loop: Loop) -> None:
        connection.data_received(HEAD + b"\r\n")
        await done(connection)
        loop.pass_(1)
        connection.data_received(HEAD)
        loop.pass_(HEAD_SECONDS - 1)
        assert not transport.closed
        loop.pass_(1)
        assert transport.closed
        assert transport.written.count(b"HTTP/1.1 408 ") == 1

    connected(use)


def test_a_whole_head_stops_the_clock_while_a_picture_is_drawn(connected: Any) -> None:
    async def use(connection: Connection, transport: Transport, loop: Loop) -> None:
        connection.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nab")
        loop.pass_(10 * HEAD_SECONDS)
        assert not transport.closed
        connection.data_received(b"cde")
        loop.pass_(10 * HEAD_SECONDS)
        assert not transport.closed
        await done(connection)

    connected(use)


def test_a_websocket_has_no_clock_for_its_head(connected: Any) -> None:
    async def use(connection: Connection, transport: Transport, loop: Loop) -> None:
        connection.data_received(UPGRADE)
        assert isinstance(transport.protocol, Socket)
        assert [timer for timer in loop.timers if not timer.cancelled] == []
        transport.protocol.connection_lost(None)
        await asyncio.gather(*transport.protocol.tasks)

    connected(use)


@pytest.mark.parametrize(("read", "aborted"), [(0, True), (READ_SECONDS * SLOWEST - 1, True),
                                               (READ_SECONDS * SLOWEST, False)])  # fmt: skip
def test_a_client_that_does_not_read_is_cut_off(connected: Any, read: float, aborted: bool) -> None:
    async def use(connection: Connection, transport: Transport, loop: Loop) -> None:
        connection.data_received(HEAD + b"\r\n")
        transport.waiting = 1 << 20
        connection.pause_writing()
        for _ in range(3):
            transport.waiting -= int(read)
            loop.pass_(READ_SECONDS)
        assert transport.aborted == aborted
        connection.resume_writing()
        transport.aborted = False
        loop.pass_(10 * READ_SECONDS)
        assert not transport.aborted
        await done(connection)

    connected(use)


def test_a_websocket_that_is_never_read_is_cut_off_by_a_real_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdxl_trt.server.http.connections.READ_SECONDS", 0.05)
    ended: list[BaseException] = []

    async def talks(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        try:
            while True:
                await send({"type": "websocket.send", "bytes": os.urandom(1 << 20)})
        except OSError as exc:
            ended.append(exc)

    async def main() -> None:
        loop, state = asyncio.get_running_loop(), ServerState()
        config = uvicorn.Config(talks, http=Connection, ws=Socket, lifespan="off", log_config=None)
        config.load()
        server = await loop.create_server(lambda: Connection(config, state, {}, loop), "127.0.0.1", 0)
        with socket.create_connection(server.sockets[0].getsockname()) as client:
            client.sendall(UPGRADE)
            while not ended:
                await asyncio.sleep(0)
        server.close()
        await server.wait_closed()
        assert not state.connections

    asyncio.run(asyncio.wait_for(main(), 30))
