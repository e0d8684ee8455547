"""Running the application: uvicorn within limits, and an end that lets running work finish."""

__all__ = ["serve"]

import asyncio
import logging
import signal
import socket
import sys
import threading
from contextlib import ExitStack
from types import FrameType
from typing import Literal

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from sdxl_trt.engines import UsageError
from sdxl_trt.server.http import Connection, Socket
from sdxl_trt.server.ops import metrics_app
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
    with ExitStack() as stack:
        listener = stack.enter_context(_listening(options.host, options.port, "--port"))
        metrics = None
        if options.metrics_port is not None:
            metrics = stack.enter_context(_listening(options.host, options.metrics_port, "--metrics-port"))
        server = _Server(_config(app, options, lifespan="on"), app, options, metrics)
        try:
            server.run(sockets=[listener])
        except SystemExit as exc:  # uvicorn's end of a start that failed
            raise getattr(app.state, "failure", exc) from None


def _config(app: ASGIApp, options: Options, lifespan: Literal["on", "off"]) -> uvicorn.Config:
    return uvicorn.Config(
        app, host=options.host, port=options.port, log_config=None, access_log=False, server_header=False,
        proxy_headers=False, backlog=ACCEPTED_AT_ONCE, timeout_graceful_shutdown=ANSWER_SECONDS,
        limit_concurrency=CONNECTIONS, http=Connection, ws=Socket, ws_max_size=FRAME_BYTES, ws_max_queue=FRAMES,
        ws_ping_interval=PING_SECONDS, ws_ping_timeout=PING_SECONDS, lifespan=lifespan,
    )  # fmt: skip


def _listening(host: str, port: int, option: str) -> socket.socket:
    """Return a socket that listens; uvicorn's own would print a traceback if the port is taken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=WAITING_CONNECTIONS)
    except OSError as exc:
        raise UsageError(f"--host {host} {option} {port}: {exc.strerror or exc}; give another one") from exc


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _log_to_stderr() -> None:
    """Write the lines of the server to stderr as they are; others' only where they warn, without tracebacks."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name, level in (("sdxl_trt.server", logging.INFO), ("uvicorn", logging.WARNING),
                        ("opentelemetry", logging.WARNING)):  # fmt: skip
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    handler.addFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Let a record through without its traceback, which names paths and may hold a prompt."""
    record.exc_info = record.exc_text = record.stack_info = None
    # The error by which a start failed is told once, by the command; uvicorn logs its traceback as a message.
    return not str(record.msg).startswith(("Traceback", "Application startup failed"))


class _Server(uvicorn.Server):
    """Ends in two steps: at the first signal, no new work is taken; at the second, running work ends at its step.

    SIGHUP has the bundle loaded anew. Metrics are served on the socket `metrics` too, if there is one.
    """

    def __init__(
        self, config: uvicorn.Config, app: FastAPI, options: Options, metrics: socket.socket | None = None
    ) -> None:
        super().__init__(config)
        self._state, self._options, self._metrics = app.state, options, metrics
        self._reloading: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[bool] | None = None
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say where."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if not self.started or not sockets:
            return
        sockets[0].listen(WAITING_CONNECTIONS)  # the event loop has set it to how many it accepts at once
        self._listen_for_reloads()
        sys.stdout.write(f"serving on http://{_address(sockets[0])}\n")
        if self._metrics is not None:
            await self._serve_metrics(self._metrics)
            sys.stdout.write(f"metrics on http://{_address(self._metrics)}/metrics\n")
        sys.stdout.flush()

    async def _serve_metrics(self, listener: socket.socket) -> None:
        """Serve metrics alone on another port, on the same event loop and within the same limits."""
        config, state = _config(metrics_app(self._state.metrics), self._options, lifespan="off"), ServerState()
        config.load()
        loop = asyncio.get_running_loop()
        serving = await loop.create_server(lambda: Connection(config, state, {}, loop), sock=listener)
        self.servers.append(serving)  # which uvicorn closes in the end

    def _listen_for_reloads(self) -> None:
        if sys.platform != "win32" and threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)

    def _reload(self) -> None:
        task = asyncio.get_running_loop().create_task(self._state.reloader.on_signal())
        self._reloading.add(task)
        task.add_done_callback(self._reloading.discard)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's own signature
        """Take a signal: drain at the first, end what runs at the second, and do not wait for anything at the third."""
        self._signals += 1
        if self._signals <= 2 and self._loop is not None and self.started:
            self._loop.call_soon_threadsafe(self._drain if self._signals == 1 else self._hurry)
        else:
            self.should_exit = True
            self.force_exit = self._signals > 2

    def _drain(self) -> None:
        self._draining = asyncio.get_running_loop().create_task(self._state.desk.drain(self._options.grace))
        self._draining.add_done_callback(self._end)

    def _hurry(self) -> None:
        for ticket in [*self._state.desk.tickets.values()]:
            ticket.cancel()

    def _end(self, _: object) -> None:
        self.should_exit = True
