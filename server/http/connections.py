"""uvicorn's connections within limits that it has not: a head that comes slowly, and a client that does not read."""

__all__ = ["Connection", "Socket"]

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

HEAD_SECONDS = 10.0
"""The seconds within which a whole request head must come: of a new connection, or after the first byte of one."""
READ_SECONDS, SLOWEST = 20.0, 1024
"""How often the answers that wait for a client are looked at, and the bytes a second that it must take."""


class _Reading:
    """Aborts a connection whose client does not read what is sent to it: such a buffer would stay for hours."""

    loop: asyncio.AbstractEventLoop
    transport: Any

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._watch: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """Take in that much waits to be read."""
        super().pause_writing()  # type: ignore[misc]  # asyncio's protocols have it
        self._look_again(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Take in that the client reads."""
        self._stop_looking()
        super().resume_writing()  # type: ignore[misc]

    def connection_lost(self, exc: Exception | None) -> None:
        """Take in that the connection is gone."""
        self._stop_looking()
        super().connection_lost(exc)  # type: ignore[misc]

    def _look_again(self, waiting: int) -> None:
        self._stop_looking()
        self._watch = self.loop.call_later(READ_SECONDS, self._look, waiting)

    def _stop_looking(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _look(self, before: int) -> None:
        waiting = self.transport.get_write_buffer_size()
        if before - waiting < READ_SECONDS * SLOWEST:
            self.transport.abort()
        else:
            self._look_again(waiting)


class Connection(_Reading, H11Protocol):
    """A connection for requests. One whose head is not whole in time is closed, with a 408 if some of it has come."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wait for the first head."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take in bytes of a head or a body."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._await_head()  # a part of a head has come
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Take in that the connection is gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Leave the connection to a websocket."""
        self._stop_waiting()
        super().handle_websocket_upgrade(event)

    def _await_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _too_slow(self) -> None:
        self._head = None
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            head = h11.Response(status_code=408, headers=[(b"connection", b"close"), (b"content-length", b"0")],
                                reason=b"Request Timeout")  # fmt: skip
            self.transport.write((self.conn.send(head) or b"") + (self.conn.send(h11.EndOfMessage()) or b""))
        self.transport.close()


class Socket(_Reading, WebSocketsSansIOProtocol):
    """A websocket."""
