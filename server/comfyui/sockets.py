"""The websockets: who listens under which client id, and what happens to those who do not read.

A client id belongs to who connected with it: somebody else with the same id has another socket, and hears nothing.
How many sockets there may be, and how fast and how much they may say, is limited before they come here.
"""

__all__ = ["Sockets", "features"]

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from starlette.websockets import WebSocket, WebSocketDisconnect

from sdxl_trt.server.http import ApiError

MOST_WAITING = 256
DROPPABLE = frozenset({"progress", "progress_state"})
DONE, TOO_SLOW = 1000, 1013
_LONGEST_ID = 128


@dataclass(eq=False)
class _Socket:
    websocket: WebSocket
    who: str
    client_id: str
    frames: asyncio.Queue[str | bytes | None] = field(default_factory=lambda: asyncio.Queue(MOST_WAITING))
    code: int = DONE
    flags: Mapping[str, Any] = field(default_factory=dict)

    def put(self, frame: str | bytes, *, droppable: bool) -> None:
        """Queue a frame; one that tells of progress is dropped if the client does not keep up."""
        if droppable and self.frames.qsize() > MOST_WAITING // 2:
            return
        try:
            self.frames.put_nowait(frame)
        except asyncio.QueueFull:
            self.close(TOO_SLOW)

    def close(self, code: int) -> None:
        """End the socket after what it has taken; what waits is lost."""
        self.code = code
        while not self.frames.empty():
            self.frames.get_nowait()
        self.frames.put_nowait(None)


class Sockets:
    """The open websockets. Used on one event loop.

    `first` makes what a socket is told when it opens, from who it is and its client id; `left` is told when the last
    socket of a client id is gone; `max_upload` is told to clients that ask.
    """

    def __init__(
        self,
        first: Callable[[str, str], list[tuple[str, Mapping[str, Any]]]],
        left: Callable[[str, str], None],
        max_upload: int,
    ) -> None:
        self._first, self._left, self._max_upload = first, left, max_upload
        self._open: dict[tuple[str, str], _Socket] = {}

    def tell(self, who: str, client_id: str | None, kind: str, data: Mapping[str, Any]) -> None:
        """Send a text frame to a client id."""
        socket = self._open.get((who, client_id or ""))
        if socket is not None:
            socket.put(_text(kind, data), droppable=kind in DROPPABLE)

    def tell_all(self, who: str, kind: str, data: Mapping[str, Any]) -> None:
        """Send a text frame to all sockets of a client."""
        for socket in [socket for (whose, _), socket in self._open.items() if whose == who]:
            socket.put(_text(kind, data), droppable=False)

    def show(self, who: str, client_id: str | None, frame: Callable[[bool], bytes]) -> None:
        """Send a binary frame to a client id; `frame` makes it, with metadata for a client that understands them."""
        socket = self._open.get((who, client_id or ""))
        if socket is not None:
            socket.put(frame(bool(socket.flags.get("supports_preview_metadata"))), droppable=True)

    def wants_previews(self, who: str, client_id: str | None) -> bool:
        """Return whether a client said that it understands previews."""
        socket = self._open.get((who, client_id or ""))
        return socket is not None and bool(socket.flags.get("supports_preview_metadata"))

    async def serve(self, websocket: WebSocket, client_id: str) -> None:
        """Serve a websocket until it is closed."""
        who = websocket.state.caller.who
        if len(client_id) > _LONGEST_ID:
            raise ApiError(400, f"clientId: is longer than {_LONGEST_ID} characters", "invalid_value", param="clientId")
        await websocket.accept()
        await self._talk(_Socket(websocket, who, client_id or uuid4().hex))

    async def _talk(self, socket: _Socket) -> None:
        key = (socket.who, socket.client_id)
        before = self._open.pop(key, None)
        if before is not None:
            before.close(DONE)
        self._open[key] = socket
        for kind, data in self._first(socket.who, socket.client_id):
            socket.put(_text(kind, data), droppable=False)
        reader = asyncio.create_task(self._read(socket))
        try:
            await _send(socket)
        finally:
            reader.cancel()
            # Before anything is awaited: a task that is cancelled does not come back from there.
            if self._open.get(key) is socket:
                del self._open[key]
                self._left(socket.who, socket.client_id)
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, socket: _Socket) -> None:
        """Read what a client says; only its first message, of its features, is used."""
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                message = await socket.websocket.receive()
                if message["type"] != "websocket.receive":
                    break
                if message.get("text"):
                    self._heard(socket, message["text"])
        socket.close(DONE)

    def _heard(self, socket: _Socket, text: str) -> None:
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            return
        if not isinstance(said, dict) or said.get("type") != "feature_flags" or not isinstance(said.get("data"), dict):
            return
        socket.flags = {"supports_preview_metadata": said["data"].get("supports_preview_metadata") is True}
        socket.put(_text("feature_flags", features(self._max_upload)), droppable=False)


def features(max_upload: int) -> dict[str, Any]:
    """Return what this server can do, as clients ask for it."""
    return {"supports_preview_metadata": True, "max_upload_size": max_upload}


async def _send(socket: _Socket) -> None:
    """Send what is queued until the socket ends."""
    with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):
        while (frame := await socket.frames.get()) is not None:
            if isinstance(frame, bytes):
                await socket.websocket.send_bytes(frame)
            else:
                await socket.websocket.send_text(frame)
        await socket.websocket.close(socket.code)


def _text(kind: str, data: Mapping[str, Any]) -> str:
    return json.dumps({"type": kind, "data": data})
