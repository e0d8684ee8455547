"""Recorded requests of real clients (clients/NAME.json), made whole and sent again.

A recording is what a client's library sent, or what its source says that it sends, with stand-ins for what a test has
to bring: a picture, a graph, a name. Nothing else is changed: the headers of a request are those of the recording, in
its order, and a header that the client did not send is not sent.

Tests are not on sys.path, so a conftest.py loads this file:

    spec = importlib.util.spec_from_file_location("replay", Path(__file__).parents[1] / "replay.py")
    replay = sys.modules["replay"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(replay)

    for call in replay.calls("webuiapi-txt2img", replay.Fill(fields={"width": 64, "height": 64})):
        answer = client.send(call.request("http://127.0.0.1:8188"))      # an httpx.Client, or await an AsyncClient's
"""

import base64
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx

CLIENTS = Path(__file__).parent / "clients"
BOUNDARY = "----recorded0123456789"
STAND_IN = re.compile(r"…|<\d+ bytes|<random>|<raw>|<name|<key>|<provider|<base64>")
Part = tuple[Sequence[str], bytes | str]
"""The header lines of a part of a form, and its data."""


@cache
def picture(width: int = 64, height: int = 64, kind: str = "PNG", mode: str = "RGB") -> bytes:
    """Return a picture file with a gradient in it; with "RGBA" its left half is transparent."""
    from PIL import Image

    image = Image.linear_gradient("L").resize((width, height)).convert(mode)
    if mode == "RGBA":
        image.paste((0, 0, 0, 0), (0, 0, width // 2, height))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@dataclass(frozen=True)
class Fill:
    """What stands in a recording's place: `picture` for files and base64, `graph` for a graph in words.

    `fields` replaces the values of fields that the recording has: of a JSON body, or of a form's text parts; a value of
    ``...`` leaves the field out. A key that is a stand-in itself ("<provider params>") takes a mapping to merge.
    `words` replaces words in headers, paths and queries. `parts` is the whole form where the recording describes it in
    words only.
    """

    picture: bytes = field(default_factory=picture)
    graph: Mapping[str, Any] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    parts: Sequence[Part] = ()


@dataclass(frozen=True)
class Call:
    """One request of a recording, whole; `expects` is what the recording says of the answer, in words."""

    method: str
    path: str
    query: str
    headers: tuple[tuple[str, str], ...]
    content: bytes
    expects: str
    case: str

    def request(self, server: str, **changed: str) -> httpx.Request:
        """Return the request to `server` (http://host:port); `changed` headers are added, with - for _ in names."""
        more = {name.replace("_", "-"): value for name, value in changed.items()}
        headers = [(name, value) for name, value in self.headers if name.lower() not in more] + [*more.items()]
        url = f"{server}{self.path}" + (f"?{self.query}" if self.query else "")
        return httpx.Request(self.method, url, headers=headers, content=self.content)

    @property
    def json(self) -> Any:
        """Return the body."""
        return json.loads(self.content)


def recording(name: str) -> dict[str, Any]:
    """Return the recording `name`, a file in clients/ without its ending."""
    found: dict[str, Any] = json.loads((CLIENTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def calls(name: str, fill: Fill | None = None) -> Iterator[Call]:
    """Yield the HTTP requests of a recording, in order. Raises ValueError for a stand-in that `fill` leaves."""
    fill = fill or Fill()
    for step in recording(name)["exchange"]:
        if "method" in step:
            yield _call(step, fill)


def frames(name: str) -> Iterator[tuple[str, Any]]:
    """Yield type and data of the frames that the recorded client read from its WebSocket, in order."""
    for step in recording(name)["exchange"]:
        if step.get("websocket") == "out":
            yield step["type"], step["data"]


def handshakes(name: str) -> Iterator[Call]:
    """Yield the WebSockets that a recorded client opened, as calls without content."""
    for step in recording(name)["exchange"]:
        if step.get("websocket") == "open":
            yield _call(step | {"method": "GET"}, Fill())


def _call(step: Mapping[str, Any], fill: Fill) -> Call:
    headers = tuple((name, _worded(value, fill)) for name, value in step["headers"].items())
    if "multipart" in step:
        content = _form(fill.parts or [_part(part, fill) for part in step["multipart"]])
        headers = tuple((name, value) for name, value in headers if name.lower() != "content-type")
        headers += (("content-type", f"multipart/form-data; boundary={BOUNDARY}"),)
    else:
        content = _body(step.get("body"), fill)
    path, query = (_worded(step.get(key, ""), fill) for key in ("path", "query"))
    return Call(step["method"], path, query, headers, content, step.get("expects", ""), step.get("case", ""))


def _worded(text: str, fill: Fill) -> str:
    for word, replacement in (*fill.words.items(), ("<key>", "sk-test"), ("<random>", BOUNDARY), ("…", "1")):
        text = text.replace(word, replacement)
    return _whole(text, "a header, path or query")


def _whole(text: str, where: str) -> str:
    if found := STAND_IN.search(text):
        raise ValueError(f"{where} has the stand-in {found[0]!r} in {text[:80]!r}: fill it")
    return text


def _body(body: Any, fill: Fill) -> bytes:
    if body is None:
        return b""
    if isinstance(body, str):
        graph = json.dumps(fill.graph) if fill.graph is not None else "{…API graph…}"
        return _whole(body.replace("{…API graph…}", graph), "the body").encode()
    filled: dict[str, Any] = {}
    for name, value in body.items():
        taken = fill.fields.get(name, _value(value, fill))
        if STAND_IN.search(name):
            filled |= fill.fields.get(name, {})
        elif name == "prompt" and fill.graph is not None and isinstance(value, Mapping):
            filled[name] = fill.graph
        elif taken is not ...:
            filled[name] = taken
    return json.dumps(_checked(filled)).encode()


def _value(value: Any, fill: Fill) -> Any:
    if isinstance(value, list):
        return [_value(each, fill) for each in value]
    if isinstance(value, str) and value.endswith("<base64>"):
        return value.partition("…")[0] + base64.b64encode(fill.picture).decode()
    return value


def _checked(body: dict[str, Any]) -> dict[str, Any]:
    for name, value in body.items():
        if isinstance(value, str):
            _whole(value, f"the field {name}")
    return body


def _part(part: Any, fill: Fill) -> Part:
    if isinstance(part, str):
        raise ValueError(f"a part is described in words, {part[:80]!r}: give `parts`")  # noqa: TRY004
    name = re.search(r'name="([^"]*)"', "\n".join(part["headers"]))
    assert name is not None
    is_file = any("filename=" in line for line in part["headers"])
    data = fill.picture if is_file else fill.fields.get(name[1], part["data"])
    return part["headers"], data


def _form(parts: Sequence[Part]) -> bytes:
    lines: list[bytes] = []
    for headers, data in parts:
        if data is ...:
            continue
        content = _whole(data, "a part").encode() if isinstance(data, str) else data
        lines += [f"--{BOUNDARY}".encode(), *(line.encode() for line in headers), b"", content]
    return b"\r\n".join([*lines, f"--{BOUNDARY}--".encode(), b""])
