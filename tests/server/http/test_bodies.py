"""JSON and forms: what is no body of ours is refused as a 400, whatever it is."""

import asyncio
import json
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.types import Message

from sdxl_trt.server.http import ApiError, Part, read_form, read_json
from sdxl_trt.server.http.bodies import MAX_DEPTH, MAX_TOKENS, parse_json

BOUNDARY = "xyz"


def request_of(chunks: Iterable[bytes], content_type: str = "") -> Request:
    messages = iter([*chunks, b""])

    async def receive() -> Message:
        body = next(messages, None)
        return {"type": "http.request", "body": body or b"", "more_body": body not in (None, b"")}

    headers = [(b"content-type", content_type.encode("latin-1", "replace"))]
    return Request({"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}, receive)


def form_of(body: bytes, content_type: str = f"multipart/form-data; boundary={BOUNDARY}") -> list[Part]:
    return asyncio.run(read_form(request_of([body] if body else [], content_type)))


def status_of(read: Callable[[], object]) -> int:
    try:
        read()
    except ApiError as exc:
        return exc.status
    return 200


def part(head: str, data: bytes) -> bytes:
    return f"--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + data + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()


@pytest.mark.parametrize("content_type", ["application/json", "text/plain;charset=UTF-8", ""])
def test_json_is_read_whatever_its_type_says(content_type: str) -> None:
    request = request_of([b'{"prompt": ', b'"\xc3\xa9 \\ud83d\\ude00", "n": 1.5}'], content_type)
    assert asyncio.run(read_json(request)) == {"prompt": "é 😀", "n": 1.5}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[1]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"a": NaN}', "not finite"),
        (b'{"a": -Infinity}', "not finite"),
        (b'{"a": 1e999}', "not finite"),
        (b'{"a": ' + b"1" * 5000 + b"}", "too long"),
        (b'{"a": 1, "a": 2}', "names a key twice"),
        (b'{"b": {"a": 1, "a": 1}}', "names a key twice"),
        (b'{"a": "\\ud800"}', "UTF-8"),
        (b'{"\\udfff": 1}', "UTF-8"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b"[" * 1_000_000, "nested"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested"),
        (b'{"a": [' + b"1," * (MAX_TOKENS + 1) + b"1]}", "too many values"),
        (b'"' + b'\\"' * 500_000, "is not JSON"),
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes, says: str) -> None:
    with pytest.raises(ApiError, match=says) as refused:
        parse_json(body)
    assert (refused.value.status, refused.value.code) == (400, "invalid_value")


def test_brackets_within_texts_are_no_depth() -> None:
    assert parse_json(json.dumps({"a": "[{" * 100 + '"\\'}).encode()) == {"a": "[{" * 100 + '"\\'}
    assert parse_json(b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(texts, json_values, max_size=3), st.booleans())
def test_every_object_is_read_as_python_wrote_it(value: dict[str, object], ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60) | st.text('{}[]":,\\ue19N', max_size=40).map(str.encode))
def test_any_bytes_are_an_object_or_a_400(body: bytes) -> None:
    assert status_of(lambda: parse_json(body)) in (200, 400)


def test_the_parts_of_a_form_are_texts_and_files_in_order() -> None:
    body = (
        b"preamble\r\n"
        + part('name="n"', b"2")
        + part('name="image[]"; filename="a.png"', b"\x00\r\n--xy\xff")
        + part('name="n"', b"3")
        + END
    )
    parts = [(each.name, each.filename, each.data) for each in form_of(body)]
    assert parts == [("n", None, b"2"), ("image[]", "a.png", b"\x00\r\n--xy\xff"), ("n", None, b"3")]


@pytest.mark.parametrize(
    "body",
    [
        b"".join(part(f'name="f{number}"', b"") for number in range(65)) + END,
        b"".join(part(f'name="f{number}"; filename="x"', b"") for number in range(65)) + END,
        part('name="prompt"', b"a" * ((1 << 20) + 1)) + END,
        part("", b"no name") + END,
        b"no boundary at all",
        b"",
        part('name="image"; filename="cut.png"', b"the form ends here"),
        part('name="n"', b"1") + END[:-4],
        f"--{BOUNDARY}\r\nContent-Type: a\r\n\r\n".encode() + END,
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; name=n".encode() + b"a" * 10_000 + b"\r\n\r\n" + END,
        part('name="n"', b"") * 100_000,
    ],
)
def test_forms_beyond_the_limits_or_damaged_are_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        form_of(body)
    assert refused.value.status == 400


def test_a_form_without_a_boundary_or_of_another_type_is_refused() -> None:
    for content_type, status in (("multipart/form-data", 400), ("application/json", 415), ("", 415)):
        with pytest.raises(ApiError) as refused:
            form_of(END, content_type)
        assert refused.value.status == status


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([part('name="a"', b"1"), part('name="b"; filename="x"', b"2"), END, b"\r\n", b"--xyz",
                                 b"--", b"\x00", b"Content-Disposition: ", b"\xff"]), max_size=8),
       st.binary(max_size=8))  # fmt: skip
def test_any_form_is_read_or_a_400(pieces: list[bytes], tail: bytes) -> None:
    assert status_of(lambda: form_of(b"".join(pieces) + tail)) in (200, 400)
