"""The gate: what every request and websocket passes before an API sees it, and every answer on its way out."""

__all__ = ["Finished", "Gate"]

import json
import logging
import math
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from sdxl_trt.server.http.caller import Caller, current_caller
from sdxl_trt.server.http.errors import ApiError
from sdxl_trt.server.http.keys import given_keys, key_id, matching_key
from sdxl_trt.server.http.limits import check_declared, limit_body, limit_messages
from sdxl_trt.server.http.origins import check_host, check_origin, cors_headers, preflight
from sdxl_trt.server.http.proxies import from_proxy
from sdxl_trt.server.http.shapes import as_api_error, error_response, owner_of
from sdxl_trt.server.options import Options

log = logging.getLogger("sdxl_trt.server")

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_WITHOUT_KEY = re.compile(r"/(page/.*|favicon\.ico)?|/health(/.*)?|/healthz|/v2/health/.*|/v1/files/.*")
"""The page's own files, what probes ask, and the files whose names cannot be guessed."""
_DOCS = ("/docs", "/redoc")
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "WEBSOCKET")
WARNING_BYTES = 2048
SOCKETS, SOCKETS_EACH = 64, 4
CSP = "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"


@dataclass(frozen=True)
class Finished:
    """A request that was answered, for logs and metrics: nothing in it was written by the client but the id.

    `method` is "OTHER" for one that HTTP does not have, and "WEBSOCKET" for a websocket.
    `route` is the route's pattern, "" if there is none. `status` is 0 if the client left before an answer began, and
    101 for a websocket.
    """

    caller: Caller
    owner: str
    method: str
    route: str
    status: int
    seconds: float


class Gate:
    """ASGI middleware: request ids, keys, hosts, origins, limits, headers and the last resort of errors.

    `tell` is called once a request, when its answer has ended; `sockets` counts each caller's open websockets;
    `allowance` returns the requests a minute that a caller may send, those that are left, and the seconds until all
    are back, or None without a limit.
    """

    def __init__(self, app: ASGIApp, options: Options, tell: Callable[[Finished], None] = lambda _: None,
                 sockets: Counter[str] | None = None, clock: Callable[[], float] = time.monotonic,
                 allowance: Callable[[str], tuple[int, int, float] | None] = lambda _: None) -> None:  # fmt: skip
        self._app, self._options, self._tell, self._clock = app, options, tell, clock
        self._allowance = allowance
        self._sockets: Counter[str] = Counter() if sockets is None else sockets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it in the shape of its API."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        from_proxy(scope, self._options.trusted_proxies)
        caller = Caller(_peer(scope), _request_id(headers))
        current_caller.set(caller)
        scope["state"] = {**scope.get("state", {}), "caller": caller}
        answer = _Answer(send, lambda: self.headers_for(scope, headers, caller))
        started = self._clock()
        try:
            await self._pass(scope, headers, caller, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "")
            self._tell(Finished(caller, owner_of(scope["path"]), _method(scope), route, answer.status,
                                self._clock() - started))  # fmt: skip

    async def _pass(self, scope: Scope, headers: Headers, caller: Caller, receive: Receive, answer: "_Answer") -> None:
        try:
            response = self._check(scope, headers, caller)
            if response is not None:
                await response(scope, receive, answer)
            elif scope["type"] == "http":
                await self._app(scope, limit_body(receive, self._options.max_body, self._clock), answer)
            else:
                await self._socket(scope, receive, answer, caller)
        except WebSocketDisconnect:
            return  # how an endpoint that only reads hears that its client left
        except Exception as exc:  # noqa: BLE001 - whatever it is, the client gets an answer of its API
            error = as_api_error(exc, self._options)
            if error.code == "internal_error":
                _log_fault(exc, caller)
            if answer.status:
                return
            await _refuse(scope, receive, answer, error_response(error, scope["path"]))

    def _check(self, scope: Scope, headers: Headers, caller: Caller) -> Response | None:
        """Raise ApiError if a request may not pass; return an answer if it needs none from an API."""
        check_host(headers, self._options)
        check_origin(scope, headers, self._options)
        if (response := preflight(scope, headers, self._options)) is not None:
            return response
        self._check_key(scope["path"], headers, caller)
        check_declared(headers, self._options.max_body)
        return None

    def _check_key(self, path: str, headers: Headers, caller: Caller) -> None:
        keys = self._options.keys
        if not keys:
            return
        key = matching_key(given_keys(headers), keys)
        if key is not None:
            caller.who = key_id(key)
        elif not _WITHOUT_KEY.fullmatch(path) and owner_of(path) not in self._options.open_apis:
            scheme = "Basic" if owner_of(path) == "a1111" else "Bearer"
            raise ApiError(401, "an API key is missing or wrong; send Authorization: Bearer KEY", "invalid_api_key",
                           headers={"WWW-Authenticate": f'{scheme} realm="trt-serve"'})  # fmt: skip

    async def _socket(self, scope: Scope, receive: Receive, answer: "_Answer", caller: Caller) -> None:
        if self._sockets.total() >= SOCKETS or self._sockets[caller.who] >= SOCKETS_EACH:
            raise ApiError(503, f"too many websockets are open; at most {SOCKETS}, and {SOCKETS_EACH} for one client",
                           "too_many_websockets", headers={"Retry-After": "5"})  # fmt: skip
        self._sockets[caller.who] += 1
        try:
            await self._app(scope, limit_messages(receive, answer, self._clock), answer)
        finally:
            self._sockets[caller.who] -= 1
            if not self._sockets[caller.who]:
                del self._sockets[caller.who]

    def headers_for(self, scope: Scope, asked: Headers, caller: Caller) -> dict[str, str]:
        """Return the headers of an answer that it may not have by itself."""
        added = {"X-Request-ID": caller.id, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        if not scope["path"].startswith(_DOCS):
            added["Content-Security-Policy"] = CSP
        if caller.warnings:
            added["X-TRT-Warnings"] = warning_header(caller.warnings)
        if owner_of(scope["path"]) not in ("ops", "page") and (allowed := self._allowance(caller.who)) is not None:
            limit, left, reset = allowed
            added |= {"x-ratelimit-limit-requests": str(limit), "x-ratelimit-remaining-requests": str(left),
                      "x-ratelimit-reset-requests": f"{math.ceil(reset)}s"}  # fmt: skip
        return added | cors_headers(asked, self._options)


class _Answer:
    """The `send` of a request: adds headers to its answer, and remembers how it began."""

    def __init__(self, send: Send, headers: Callable[[], dict[str, str]]) -> None:
        self._send, self._headers, self.status = send, headers, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
            self.status = message.get("status", 101)
            message.setdefault("headers", [])
            headers = MutableHeaders(scope=message)
            for name, value in self._headers().items():
                headers.setdefault(name, value)
        elif message["type"] == "websocket.close" and not self.status:
            self.status = 403
        await self._send(message)


def warning_header(warnings: Iterable[str]) -> str:
    """Return warnings as a JSON list in ASCII, without those that are too many for a header."""
    kept: list[str] = []
    for warning in warnings:
        if len(json.dumps([*kept, warning])) > WARNING_BYTES:
            break
        kept.append(warning)
    return json.dumps(kept)


async def _refuse(scope: Scope, receive: Receive, send: Send, response: Response) -> None:
    if scope["type"] == "http":
        await response(scope, receive, send)
    elif "websocket.http.response" in scope.get("extensions", {}):
        await WebSocket(scope, receive, send).send_denial_response(response)
    else:
        await send({"type": "websocket.close", "code": 1008})


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    return f"peer:{client[0]}" if client else "peer:unknown"


def _method(scope: Scope) -> str:
    method: str = scope.get("method", "WEBSOCKET")
    return method if method in _METHODS else "OTHER"


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _ID.fullmatch(given) else uuid4().hex


def _log_fault(exc: Exception, caller: Caller) -> None:
    """Log where an error was raised, and no more: its message may hold a prompt, and its traceback paths."""
    frame = traceback.extract_tb(exc.__traceback__)[-1]
    log.error("request %s failed: %s in %s, line %s", caller.id, type(exc).__name__, frame.name, frame.lineno)
