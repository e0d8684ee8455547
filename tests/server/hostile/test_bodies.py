"""Bodies without end, too slow, too large, too deep or damaged: each is refused, and none takes the memory.

Run with -s to see the memory that each takes.
"""

import base64
import io
import json
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from PIL import Image

MIB = 1 << 20
MOST = 2 * 32 * MIB
DRAW, EDIT = "/v1/images/generations", "/v1/images/edits"
FORM = "multipart/form-data; boundary=b"
PATHS = (DRAW, "/prompt", "/sdapi/v1/img2img")


@pytest.fixture(autouse=True)
def within_memory(server: Any, request: pytest.FixtureRequest) -> Iterator[None]:
    """No test may take more than twice the longest body beyond what the server had, nor end it."""
    server.forget_peak()
    before = server.memory()
    yield
    taken = server.memory("VmHWM") - before
    sys.stdout.write(f"{request.node.name}: {taken / MIB:.1f} MiB\n")
    assert taken < MOST
    assert server.ask("GET", "/health/ready")[0] == 200


def sent_until_refused(kit: Any, server: Any, head: bytes, chunks: Iterator[bytes]) -> tuple[int, int]:
    """Send chunks until an answer comes; return its status, and how many bytes were sent."""
    sent = 0
    with server.connect() as connection:
        connection.sendall(head)
        try:
            for chunk in chunks:
                connection.settimeout(30)
                connection.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass
        return kit.answer(connection)[0], sent


def endless(first: bytes = b"", part: bytes = b"a" * 65536) -> Iterator[bytes]:
    if first:
        yield b"%x\r\n%s\r\n" % (len(first), first)
    for _ in range(1024 * MIB // len(part)):
        yield b"%x\r\n%s\r\n" % (len(part), part)


@pytest.mark.parametrize("path", [*PATHS, EDIT, "/upload/image"])
def test_a_body_of_10_gib_is_refused_before_it_is_sent(kit: Any, server: Any, path: str) -> None:
    with server.connect() as connection:
        connection.sendall(kit.head("POST", path, Content_Length=str(10 << 30)))
        assert kit.answer(connection)[0] == 413


@pytest.mark.parametrize("path", PATHS)
def test_chunks_without_end_are_refused(kit: Any, server: Any, path: str) -> None:
    head = kit.head("POST", path, Transfer_Encoding="chunked", Content_Type="application/json")
    status, sent = sent_until_refused(kit, server, head, endless(b'{"prompt": "'))
    assert status in (413, 0)
    assert sent < 64 * MIB


@pytest.mark.parametrize("path", [EDIT, "/upload/image"])
def test_a_file_of_1_gib_in_a_form_is_refused(kit: Any, server: Any, path: str) -> None:
    head = kit.head("POST", path, Transfer_Encoding="chunked", Content_Type=FORM)
    first = b'--b\r\nContent-Disposition: form-data; name="image"; filename="MARKERWORD.png"\r\n\r\n'
    status, sent = sent_until_refused(kit, server, head, endless(first))
    assert status in (413, 0)
    assert sent < 64 * MIB


def test_base64_of_64_mib_is_refused(server: Any) -> None:
    body = b'{"prompt": "MARKERWORD", "image": "%s"}' % base64.b64encode(bytes(48 * MIB))
    assert server.ask("POST", DRAW, body)[0] in (413, 0)


def form(*parts: tuple[str, bytes]) -> bytes:
    lines = [b"--b\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (name.encode(), data) for name, data in parts]
    return b"".join(lines) + b"--b--\r\n"


@pytest.mark.parametrize("path", [EDIT, "/upload/image"])
@pytest.mark.parametrize(
    "body",
    [
        form(*[(f'name="f{number}"', b"MARKERWORD") for number in range(100_000)]),
        form(('name="image"; filename="a.png"', b"MARKERWORD"))[:-5],
        form(('name="image\r\nX-Evil: 1"; filename="a\r\nb.png"', b"MARKERWORD")),
        form(('name="image[]"', b"MARKERWORD")),
        form(('name="prompt"', b"MARKERWORD" * (1 << 18))),
        b"--b\r\n" * 100_000,
        b"",
    ],
    ids=["100,000 parts", "cut off", "line ends in names", "a picture as text", "a long field", "boundaries", "empty"],
)
def test_a_damaged_form_is_refused(server: Any, body: bytes, path: str) -> None:
    status, told = server.ask("POST", path, body, Content_Type=FORM)
    assert status == 400
    assert b"Traceback" not in told


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"[" * 1_000_000, b'{"a":' * 1_000_000, b'{"a": [' + b"1," * 10_000_000 + b"1]}",
        b"{" + b",".join(b'"%d":1' % number for number in range(2_000_000)) + b"}",
        b'{"prompt": NaN}', b'{"seed": 1e999}', b'{"seed": ' + b"1" * 1_000_000 + b"}",
        b'{"prompt": 1, "prompt": 2}', b'{"prompt": "\\ud800"}', b'{"prompt": "' + b"\\" * MIB, b"\xff\xfe", b"", b"[]",
    ],
    ids=["deep lists", "deep objects", "10^7 values", "2*10^6 keys", "NaN", "infinity", "a long number", "a key twice",
         "a lone surrogate", "a text without end", "no UTF-8", "empty", "a list"],
)  # fmt: skip
def test_json_that_is_none_is_refused(server: Any, path: str, body: bytes) -> None:
    status, told = server.ask("POST", path, body)
    assert status in (400, 422)
    assert b"Traceback" not in told


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    whole = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in whole
    )


def bomb() -> bytes:
    """Return the compressed zeros of 1 GiB."""
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(MIB)) for _ in range(1024)) + packer.flush()


def picture(kind: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, kind, **more)
    return buffer.getvalue()


PICTURES: dict[str, Callable[[], bytes]] = {
    "a PNG of 65535 by 65535": lambda: png(65535, 65535),
    "a PNG with 1 GiB of text": lambda: png(64, 64, (b"zTXt", b"a\0\0" + bomb())),
    "an animated WebP": lambda: picture("WEBP", save_all=True, append_images=[Image.new("RGB", (64, 64))]),
    "half a JPEG": lambda: picture("JPEG")[:-300],
    "a GIF": lambda: picture("GIF"),
    "an SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><text>MARKERWORD</text></svg>',
    "an EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "HTML": lambda: b"<html>MARKERWORD</html>",
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_is_none_is_refused(server: Any, name: str) -> None:
    data = PICTURES[name]()
    body = form(('name="prompt"', b"MARKERWORD"), ('name="image"; filename="MARKERWORD.png"', data))
    assert server.ask("POST", EDIT, body, Content_Type=FORM)[0] == 400
    body = form(('name="image"; filename="MARKERWORD.png"', data))
    assert server.ask("POST", "/upload/image", body, Content_Type=FORM)[0] == 400
    body = json.dumps({"prompt": "MARKERWORD", "init_images": [base64.b64encode(data).decode()]}).encode()
    assert server.ask("POST", "/sdapi/v1/img2img", body)[0] in (400, 422)


ODD = [-1, 0, 1 << 64, 1e308, "MARKERWORD", True, [], {}, "9" * 10_000]


@pytest.mark.parametrize("field", ["n", "steps", "size", "seed", "guidance_scale", "handoff", "sampler", "scheduler"])
def test_odd_values_never_fail_the_server(server: Any, field: str) -> None:
    usual = {"prompt": "MARKERWORD", "size": "64x64", "steps": 2}
    for value in ODD:
        status, told = server.ask("POST", DRAW, json.dumps({**usual, field: value}).encode())
        assert status in (200, 400), (value, told)
        assert b"Traceback" not in told


def drips(connection: socket.socket, data: bytes, results: dict[str, Any], name: str) -> None:
    """Send a byte a second until an answer comes; note its status and after how many seconds it came."""
    began = time.monotonic()
    connection.settimeout(1 if data else 60)
    status = -1
    for byte in data or b"\0":
        try:
            if data:
                connection.sendall(bytes([byte]))
            status = int((connection.recv(65536) or b"HTTP/1.1 0").split()[1])
            break
        except TimeoutError:
            continue
    results[name] = (status, round(time.monotonic() - began, 1))


def test_slow_heads_and_bodies_are_given_up_in_time(kit: Any, server: Any) -> None:
    results: dict[str, Any] = {}
    whole = kit.head("POST", DRAW, Content_Length="1000")
    cases = {
        "body": (whole, b"a" * 60), "head": (whole[:20], b"a" * 60), "stopped body": (whole + b"{", b""),
        "stopped head": (whole[:20], b""), "silence": (b"", b""),
    }  # fmt: skip
    with ExitStack() as stack:
        threads = []
        for name, (first, rest) in cases.items():
            connection = stack.enter_context(server.connect())
            connection.sendall(first)
            threads.append(threading.Thread(target=drips, args=(connection, rest, results, name)))
            threads[-1].start()
        for thread in threads:
            thread.join()
    sys.stdout.write(f"{results}\n")
    assert {name: status for name, (status, _) in results.items()} == {
        "body": 408, "stopped body": 408, "head": 408, "stopped head": 408, "silence": 0,
    }  # fmt: skip
    assert all(seconds < 15 for _, seconds in results.values())


def test_a_body_within_the_limit_takes_no_more_than_its_share(server: Any) -> None:
    body = b'{"prompt": "MARKERWORD", "image": "%s"}' % base64.b64encode(bytes(23 * MIB))
    assert server.ask("POST", DRAW, body)[0] == 400


def test_nothing_of_all_this_stays(server: Any) -> None:
    assert server.memory() - server.warm < MOST
