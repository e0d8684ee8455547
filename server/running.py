"""Running the application: uvicorn within limits, and an end that lets running work finish."""

__all__ = ["serve"]

import asyncio
import logging
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from sdxl_trt.engines import UsageError
from sdxl_trt.server.ops import drained
from sdxl_trt.server.options import Options

CONNECTIONS = 1024
WAITING_CONNECTIONS, ACCEPTED_AT_ONCE = 2048, 16
"""A thousand connections that come at once wait, rather than hold up the event loop until all are accepted."""
FRAME_BYTES, FRAMES, PING_SECONDS = 64 << 10, 32, 20.0
ANSWER_SECONDS = 10
"""How long answers that are being written may take after the last picture is drawn."""


def serve(app: FastAPI, options: Options) -> None:
    """Serve `app` until a signal comes; raises SdxlTrtError if the bundle cannot be opened or the port is taken."""
    _log_to_stderr()
    server = _Server(_config(app, options), app, options)
    with _listening(options) as listener:
        try:
            server.run(sockets=[listener])
        except SystemExit as exc:  # uvicorn's end of a start that failed
            raise getattr(app.state, "failure", exc) from None


def _config(app: FastAPI, options: Options) -> uvicorn.Config:
    return uvicorn.Config(
        app, host=options.host, port=options.port, log_config=None, access_log=False, server_header=False,
        proxy_headers=False, backlog=ACCEPTED_AT_ONCE, timeout_graceful_shutdown=ANSWER_SECONDS,
        limit_concurrency=CONNECTIONS,
        ws_max_size=FRAME_BYTES, ws_max_queue=FRAMES, ws_ping_interval=PING_SECONDS, ws_ping_timeout=PING_SECONDS,
        lifespan="on",
    )  # fmt: skip


def _listening(options: Options) -> socket.socket:
    """Return a socket that listens; uvicorn's own would print a traceback if the port is taken."""
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((options.host, options.port), family=family, backlog=WAITING_CONNECTIONS)
    except OSError as exc:
        raise UsageError(
            f"--host {options.host} --port {options.port}: {exc.strerror or exc}; give another one"
        ) from exc


def _log_to_stderr() -> None:
    """Write the lines of the server to stderr as they are; uvicorn's own only where they warn, without tracebacks."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours, theirs = logging.getLogger("sdxl_trt.server"), logging.getLogger("uvicorn")
    for logger, level in ((ours, logging.INFO), (theirs, logging.WARNING)):
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    handler.addFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Let a record through without its traceback, which names paths and may hold a prompt."""
    record.exc_info = record.exc_text = record.stack_info = None
    # The error by which a start failed is told once, by the command; uvicorn logs its traceback as a message.
    return not str(record.msg).startswith(("Traceback", "Application startup failed"))


class _Server(uvicorn.Server):
    """Ends in two steps: at the first signal, no new work is taken; at the second, running work ends at its step."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, options: Options) -> None:
        super().__init__(config)
        self._state, self._options = app.state, options
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say where."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(WAITING_CONNECTIONS)  # the event loop has set how many it accepts at once
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            sys.stdout.write(f"serving on http://{shown}:{port}\n")
            sys.stdout.flush()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's own signature
        """Take a signal: drain at the first, end at the second."""
        self._signals += 1
        if self._signals == 1 and self._loop is not None and self.started:
            self._loop.call_soon_threadsafe(self._drain)
        else:
            self.should_exit = True
            self.force_exit = self._signals > 2

    def _drain(self) -> None:
        self._draining = asyncio.get_running_loop().create_task(drained(self._state.desk, self._options.grace))
        self._draining.add_done_callback(self._end)

    def _end(self, _: object) -> None:
        self.should_exit = True
