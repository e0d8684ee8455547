"""The gate: keys, hosts, origins, limits, headers, and errors in the shape of each API."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_network

import httpx
import pytest
from fastapi import FastAPI, Query
from starlette.requests import Request
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.types import Message
from starlette.websockets import WebSocket

from sdxl_trt.engines import EngineError, ResourceError, UsageError
from sdxl_trt.server.http import ApiError, Finished, Gate, add_handlers, key_id, read_form, read_json
from sdxl_trt.server.http.limits import limit_body, limit_messages
from sdxl_trt.server.ops import Metrics, log_request
from sdxl_trt.server.options import Options
from sdxl_trt.server.refusals import Draining, QueueFull, TooLate

SOCKET = "ws://127.0.0.1/ws"
KEY, WORD = "sk-MARKER-KEY", "MARKERWORD"
PATHS = ("/v1/x", "/sdapi/v1/x", "/prompt")
FAULTS: dict[str, Exception] = {
    "api": ApiError(400, "size: is too large", "invalid_value", param="size"), "full": QueueFull("full", 7),
    "late": TooLate("late", 500), "draining": Draining("stopping", 30), "usage": UsageError("seed: is no number"),
    "memory": ResourceError(f"/home/me {WORD}"), "engine": EngineError(f"/home/me {WORD}"), "bug": RuntimeError(WORD),
}  # fmt: skip


def served(options: Options, told: list[Finished] | None = None) -> FastAPI:
    app = FastAPI()

    async def work(request: Request) -> dict[str, object]:
        if (fault := request.query_params.get("fault")) is not None:
            raise FAULTS[fault]
        request.state.caller.warnings += json.loads(request.query_params.get("warn", "[]"))
        form = request.headers.get("content-type", "").startswith("multipart")
        body = request.method == "POST" and (await read_form(request) if form else await read_json(request))
        return {"who": request.state.caller.who, "size": len(str(body))}

    async def typed(number: int = Query()) -> int:
        return number

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(websocket.state.caller.who)
        while True:
            await websocket.receive_text()

    for path in (*PATHS, "/", "/health/live", "/v1/files/{name}", "/page/a.js"):
        app.add_api_route(path, work, methods=["GET", "POST"])
    for path in ("/v1/typed", "/sdapi/typed", "/typed"):
        app.add_api_route(path, typed)
    app.add_api_websocket_route("/ws", socket)
    app.add_middleware(Gate, options=options, tell=(told if told is not None else []).append)
    add_handlers(app, options)
    return app


Ask = Callable[..., httpx.Response]


@pytest.fixture
def ask() -> Ask:
    """Ask a server with `options` for a path, over ASGI, from the peer 10.0.0.9."""

    def send(path: str, options: Options = Options(), *, method: str = "GET", host: str = "127.0.0.1:8188",  # noqa: B008
             told: list[Finished] | None = None, **settings: object) -> httpx.Response:  # fmt: skip
        async def once() -> httpx.Response:
            transport = httpx.ASGITransport(served(options, told), client=("10.0.0.9", 1))
            async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
                return await client.request(method, path, **settings)  # type: ignore[arg-type]

        return asyncio.run(once())

    return send


def basic(text: str) -> str:
    return f"Basic {base64.b64encode(text.encode()).decode()}"


@pytest.mark.parametrize("header", ["", "Basic", "Bearer", "Basic dW5kZWZpbmVk", "Basic %%%", "Bearer  ", "Digest x"])
def test_without_keys_any_authorization_is_ignored(ask: Ask, header: str) -> None:
    assert ask("/v1/x", headers={"Authorization": header}).json()["who"] == "peer:10.0.0.9"


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"}, {"Authorization": f"bearer   {KEY}"}, {"Authorization": basic(f"me:{KEY}")},
        {"Authorization": basic(f":{KEY}")}, {"x-api-key": KEY}, {"api-key": KEY},
    ],
)  # fmt: skip
def test_a_key_is_taken_in_every_form(ask: Ask, headers: dict[str, str]) -> None:
    answer = ask("/v1/x", Options(keys=frozenset({"other", KEY})), headers=headers)
    assert answer.json()["who"] == key_id(KEY)
    assert len(key_id(KEY)) == 12
    assert KEY not in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"Authorization": "Bearer"}, {"Authorization": "Basic"}, {"Authorization": "Basic !"},
        {"Authorization": f"Bearer {KEY}x"}, {"Authorization": f"Bearer {KEY[:-1]}"}, {"Authorization": KEY},
        {"Authorization": basic(KEY)}, {"Authorization": basic(f"{KEY}:")}, {"x-api-key": ""},
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [*PATHS, "/nowhere", "/openapi.json"])
def test_a_missing_or_wrong_key_is_a_401_before_anything_is_told(ask: Ask, path: str, headers: dict[str, str]) -> None:
    answer = ask(path, Options(keys=frozenset({KEY})), headers=headers)
    assert answer.status_code == 401
    scheme = "Basic" if path.startswith("/sdapi") else "Bearer"
    assert answer.headers["WWW-Authenticate"].startswith(scheme)
    assert KEY not in answer.text


@pytest.mark.parametrize("path", ["/", "/health/live", "/v1/files/0123.png", "/page/a.js"])
def test_probes_the_page_and_unguessable_files_need_no_key(ask: Ask, path: str) -> None:
    assert ask(path, Options(keys=frozenset({KEY}))).status_code == 200


def test_open_apis_need_no_key_and_others_do(ask: Ask) -> None:
    options = Options(keys=frozenset({KEY}), open_apis=frozenset({"a1111"}))
    assert [ask(path, options).status_code for path in PATHS] == [401, 200, 401]


@pytest.mark.parametrize(
    ("host", "listening", "allowed", "status"),
    [
        ("127.0.0.1:8188", "127.0.0.1", "", 200), ("localhost", "127.0.0.1", "", 200), ("[::1]:1", "::1", "", 200),
        ("evil.example", "127.0.0.1", "", 403), ("127.0.0.1.evil.example", "127.0.0.1", "", 403),
        ("box.lan", "0.0.0.0", "", 200), ("box.lan", "0.0.0.0", "box.lan", 200), ("evil", "0.0.0.0", "box.lan", 403),
        ("box.lan.:80", "0.0.0.0", "BOX.lan", 200),
    ],
)  # fmt: skip
def test_only_our_own_names_are_answered(ask: Ask, host: str, listening: str, allowed: str, status: int) -> None:
    names = frozenset({allowed} - {""})
    assert ask("/v1/x", Options(host=listening, allowed_hosts=names), host=host).status_code == status


@pytest.mark.parametrize(
    ("host", "origin", "method", "status"),
    [
        ("127.0.0.1:8188", "http://127.0.0.1:8188", "POST", 200), ("127.0.0.1:8188", "http://127.0.0.1:9", "POST", 403),
        ("127.0.0.1:8188", "http://evil.example", "GET", 403), ("127.0.0.1:8188", "null", "POST", 403),
        ("127.0.0.1:8188", "", "GET", 403), ("127.0.0.1:8188", "http://", "POST", 403),
        ("box.lan", "http://evil.example", "POST", 403), ("box.lan", "http://evil.example", "GET", 200),
        ("box.lan", "https://box.lan", "POST", 200), ("box.lan", "http://box.lan:80", "POST", 200),
        ("box.lan", "http://box.lan@evil", "POST", 403), ("box.lan", "http://page.example", "POST", 200),
    ],
)  # fmt: skip
def test_pages_of_other_origins_are_refused(ask: Ask, host: str, origin: str, method: str, status: int) -> None:
    options = Options(host="0.0.0.0", cors_origins=frozenset({"http://page.example"}))
    answer = ask("/v1/x", options, host=host, method=method, headers={"Origin": origin}, content=b"{}")
    assert answer.status_code == status
    listed = origin == "http://page.example"
    assert answer.headers.get("Access-Control-Allow-Origin") == (origin if listed else None)


def test_only_a_listed_page_is_told_what_it_may_send(ask: Ask) -> None:
    options = Options(keys=frozenset({KEY}), cors_origins=frozenset({"http://page.example"}))
    asking = {"Access-Control-Request-Method": "POST"}
    listed = ask("/v1/x", options, method="OPTIONS", headers={"Origin": "http://page.example", **asking})
    assert (listed.status_code, listed.headers["Access-Control-Allow-Origin"]) == (204, "http://page.example")
    assert "Access-Control-Allow-Credentials" not in listed.headers
    assert ask("/v1/x", options, method="OPTIONS", headers={"Origin": "http://evil", **asking}).status_code == 403


@pytest.mark.parametrize(
    ("fault", "status", "code", "headers"),
    [
        ("api", 400, "invalid_value", {}), ("full", 429, "queue_full", {"Retry-After": "7"}),
        ("late", 429, "rate_limit_exceeded", {"Retry-After": "120"}), ("usage", 400, "invalid_value", {}),
        ("draining", 503, "not_ready", {"Retry-After": "30"}),
        ("engine", 500, "engine_error", {"x-should-retry": "false"}),
        ("memory", 500, "out_of_memory", {"x-should-retry": "false"}),
        ("bug", 500, "internal_error", {"x-should-retry": "false"}),
    ],
)  # fmt: skip
def test_errors_have_the_shape_of_their_api(
    ask: Ask, fault: str, status: int, code: str, headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    answers = [ask(f"{path}?fault={fault}", headers={"X-Request-ID": "me-1"}) for path in PATHS]
    for answer in answers:
        assert answer.status_code == status
        assert {name: answer.headers.get(name) for name in headers} == headers
        assert answer.headers["X-Request-ID"] == "me-1"
        assert WORD not in answer.text
        assert "/home" not in answer.text
    openai, a1111, comfyui = (answer.json() for answer in answers)
    assert openai["error"]["code"] == code
    assert set(openai["error"]) == {"message", "type", "param", "code"}
    assert {**a1111, "detail": ""} == {"error": "HTTPException", "detail": "", "body": "", "errors": ""}
    assert a1111["detail"] == openai["error"]["message"]
    assert comfyui == {"error": {"type": code, "message": a1111["detail"], "details": openai["error"]["param"] or "",
                                 "extra_info": {}}, "node_errors": {}}  # fmt: skip
    assert WORD not in caplog.text
    assert "Traceback" not in caplog.text
    assert ("RuntimeError in work" in caplog.text) == (fault == "bug")


def test_fastapi_s_own_errors_have_the_shape_too(ask: Ask) -> None:
    assert ask("/v1/nowhere").json()["error"]["code"] == "not_found"
    assert ask("/v1/x", method="DELETE").json()["error"]["code"] == "method_not_allowed"
    assert ask("/nowhere").json()["error"]["type"] == "not_found"
    bad = {"number": WORD}
    assert (ask("/v1/typed", params=bad).status_code, ask("/sdapi/typed", params=bad).status_code) == (400, 422)
    assert ask("/v1/typed", params=bad).json()["error"]["message"].startswith("number")
    found = ask("/sdapi/typed", params=bad)
    assert found.json()["detail"][0]["loc"] == ["query", "number"]
    assert WORD not in found.text


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\tb", "é"])
def test_a_request_id_that_is_none_is_replaced(ask: Ask, given: str) -> None:
    answer = ask("/v1/x", headers={"X-Request-ID": given.encode()})
    assert len(answer.headers["X-Request-ID"]) == 32


def test_warnings_are_ascii_json_of_at_most_2_kib(ask: Ask) -> None:
    warnings = ["é\r\nSet-Cookie: a=b", *["w" * 100] * 40]
    header = ask("/v1/x", params={"warn": json.dumps(warnings)}).headers["X-TRT-Warnings"]
    kept = json.loads(header)
    assert header.isascii()
    assert len(header) <= 2048
    assert kept == warnings[: len(kept)]
    assert len(kept) > 15


def test_every_answer_has_the_headers_that_browsers_heed(ask: Ask) -> None:
    for answer in (ask("/v1/x"), ask("/nowhere"), ask("/v1/x", host="evil")):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]


async def in_chunks(size: int, count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b" " * size


@pytest.mark.parametrize("path", PATHS)
def test_bodies_beyond_the_limit_are_refused_declared_chunked_and_multipart(ask: Ask, path: str) -> None:
    options = Options(max_body=1000)
    declared = ask(path, options, method="POST", content=b"{}", headers={"Content-Length": str(10 << 30)})
    chunked = ask(path, options, method="POST", content=in_chunks(100, 1000))
    multipart = ask(path, options, method="POST", files={"image": ("a", b"x" * 2000)})
    for answer in (declared, chunked, multipart):
        assert (answer.status_code, answer.headers["Connection"]) == (413, "close")
        assert "1000 bytes" in answer.text
    assert ask(path, options, method="POST", content=b"{}" + b" " * 998).status_code == 200
    assert ask(path, options, method="POST", content=b"{}" + b" " * 999).status_code == 413


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def feed(clock: Clock, size: int, seconds: float, times: list[float]) -> None:
    """Send `size` bytes every `seconds` until the body is refused; note the time after each chunk in `times`."""

    async def receive() -> Message:
        clock.now += seconds
        return {"type": "http.request", "body": b"x" * size, "more_body": True}

    limited = limit_body(receive, 1 << 30, clock)
    while True:
        await limited()
        times.append(clock.now)


@pytest.mark.parametrize(
    ("size", "seconds", "least", "most"), [(1, 1.0, 4, 6), (512, 1.0, 9, 11), (1 << 20, 1, 28, 30)]
)
def test_slow_bodies_are_refused(size: int, seconds: float, least: float, most: float) -> None:
    times: list[float] = []
    with pytest.raises(ApiError) as refused:
        asyncio.run(feed(Clock(), size, seconds, times))
    assert refused.value.status == 408
    assert least <= times[-1] <= most


def test_a_body_that_stops_is_refused_and_waiting_for_the_end_has_no_limit() -> None:
    clock = Clock()

    async def stop() -> None:
        async def receive() -> Message:
            clock.now = 100.0
            return {"type": "http.request", "body": b"", "more_body": True}

        async def never() -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        with pytest.raises(ApiError):
            await limit_body(receive, 10, clock)()
        times = iter([0.0, 100.0])
        limited = limit_body(never, 10, lambda: next(times))
        with pytest.raises(ApiError):
            await limited()

        async def whole() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        after = limit_body(whole, 10, clock)
        await after()
        clock.now += 1e6
        assert (await after())["type"] == "http.request"

    asyncio.run(stop())


def test_websockets_have_keys_origins_and_a_number() -> None:
    keyed = TestClient(served(Options(keys=frozenset({KEY}))), base_url="http://127.0.0.1")
    with keyed.websocket_connect(SOCKET, headers={"Authorization": basic(f"me:{KEY}")}) as socket:
        assert socket.receive_text() == key_id(KEY)
    client = TestClient(served(Options()), base_url="http://127.0.0.1")
    refusals = ((keyed, {}, 401), (client, {"Origin": "http://evil"}, 403), (client, {"Host": "evil"}, 403))
    for refusing, headers, status in refusals:
        with pytest.raises(WebSocketDenialResponse) as refused, \
                refusing.websocket_connect(SOCKET, headers=headers):  # fmt: skip
            pass
        assert refused.value.status_code == status


def test_a_fifth_websocket_of_a_client_is_refused_until_one_closes(caplog: pytest.LogCaptureFixture) -> None:
    client = TestClient(served(Options()), base_url="http://127.0.0.1")
    with client:
        sockets = [client.websocket_connect(SOCKET) for _ in range(4)]
        for socket in sockets:
            socket.__enter__()
        with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect(SOCKET):
            pass
        assert refused.value.status_code == 503
        for socket in sockets:
            socket.__exit__(None, None, None)
        with client.websocket_connect(SOCKET) as socket:
            assert socket.receive_text().startswith("peer:")
    assert "failed" not in caplog.text


def test_a_websocket_that_talks_too_fast_is_closed() -> None:
    clock, sent = Clock(), list[Message]()

    async def talk() -> list[str]:
        async def receive() -> Message:
            return {"type": "websocket.receive", "text": ""}

        async def send(message: Message) -> None:
            sent.append(message)

        limited = limit_messages(receive, send, clock)
        kinds = [(await limited())["type"] for _ in range(10)]
        clock.now = 1.0
        kinds += [(await limited())["type"] for _ in range(10)]
        return [*kinds, (await limited())["type"]]

    kinds = asyncio.run(talk())
    assert kinds == ["websocket.receive"] * 20 + ["websocket.disconnect"]
    assert [(each["type"], each["code"]) for each in sent] == [("websocket.close", 1008)]


def test_what_is_told_of_a_request_has_no_word_of_its_client(ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    told: list[Finished] = []
    metrics = Metrics(lambda: 0, "1")
    headers = {"Authorization": f"Bearer {KEY}", "X-User": WORD}
    with caplog.at_level(logging.INFO, "sdxl_trt.server"):
        for path in (f"/{WORD}", f"/v1/x?fault=bug&prompt={WORD}", f"/v1/files/{WORD}", f"/v1/x?warn=[%22{WORD}%22]"):
            ask(path, Options(keys=frozenset({KEY})), told=told, headers=headers)
        for finished in told:
            log_request(finished)
            metrics.tell(finished)
    text = caplog.text + metrics.text()[0].decode()
    assert [finished.status for finished in told] == [404, 500, 200, 200]
    assert key_id(KEY) in caplog.text
    for word in (WORD, KEY):
        assert word not in text


def test_a_trusted_proxy_says_who_calls(ask: Ask) -> None:
    options = Options(trusted_proxies=(ip_network("10.0.0.0/24"),))
    forwarded = {"X-Forwarded-For": "1.2.3.4, 203.0.113.9"}
    assert ask("/v1/x", options, headers=forwarded).json()["who"] == "peer:203.0.113.9"
    assert ask("/v1/x", headers=forwarded).json()["who"] == "peer:10.0.0.9"
