"""Spans: a request, what it had drawn, and its stages in order; nothing of what a client wrote."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from sdxl_trt.engines import EngineError, UsageError
from sdxl_trt.server import Options, create_app
from sdxl_trt.server.ops import Traces

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ASKED = {"prompt": "MARKERWORD", "size": "64x64", "steps": 4, "seed": 3, "n": 2, "user": "MARKERWORD",
         "negative_prompt": "MARKERWORD"}  # fmt: skip
KEY = "sk-MARKERKEY"
HEADERS = {"Authorization": f"Bearer {KEY}", "X-Request-ID": "MARKERWORD", "User-Agent": "MARKERWORD"}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("sdxl_trt.server.ops.operations.open_traces",
                        lambda model: Traces(provider.get_tracer("test"), model))  # fmt: skip
    yield exporter
    provider.shutdown()


def below(spans: tuple[ReadableSpan, ...], parent: ReadableSpan) -> list[ReadableSpan]:
    context = parent.context
    assert context is not None
    found = [span for span in spans if span.parent is not None and span.parent.span_id == context.span_id]
    return sorted(found, key=lambda span: span.start_time or 0)


def one(spans: tuple[ReadableSpan, ...], name: str) -> ReadableSpan:
    (found,) = (span for span in spans if span.name == name)
    return found


def test_a_request_is_a_span_its_order_a_child_and_its_stages_grandchildren(served: Any, spans: Any) -> None:
    with served(traces=True, keys=frozenset({KEY})) as client:
        client.get("/health/live")
        answer = client.post("/v1/images/generations", json=ASKED,
                             headers=HEADERS | {"traceparent": f"00-{TRACE}-{PARENT}-01"})  # fmt: skip
    made = spans.get_finished_spans()
    request, order = one(made, "POST /v1/images/generations"), one(made, "generate")
    assert request.kind is SpanKind.SERVER
    assert request.parent is not None
    assert format(request.parent.span_id, "016x") == PARENT
    assert all(format(span.context.trace_id, "032x") == TRACE for span in made)
    assert answer.headers["traceparent"] == f"00-{TRACE}-{request.context.span_id:016x}-01"
    assert dict(request.attributes or {}) == {
        "http.request.method": "POST", "url.scheme": "http", "network.protocol.version": "1.1",
        "http.route": "/v1/images/generations", "http.response.status_code": 200,
    }  # fmt: skip
    assert below(made, request) == [order]
    assert dict(order.attributes or {}) == {
        "gen_ai.operation.name": "generate_content", "gen_ai.output.type": "image", "gen_ai.request.choice.count": 2,
        "gen_ai.request.seed": 3, "gen_ai.request.stream": False, "gen_ai.request.model": "sdxl-trt-embedded",
        "trt.outcome": "done",
    }  # fmt: skip
    stages = below(made, order)
    assert [span.name for span in stages] == ["queue", "encode", "swap", "base", "swap", "refiner", "decode"]
    ends = [span.end_time for span in stages]
    assert all(start.start_time >= end for end, start in zip(ends, stages[1:], strict=False))
    assert order.start_time <= stages[0].start_time
    assert order.end_time >= ends[-1]
    steps = sum(len(span.events) for span in stages if span.name in ("base", "refiner"))
    assert steps == 2 * 4
    for span in made:
        assert "MARKER" not in span.to_json()


def test_what_fails_is_an_error_of_its_spans(served: Any, spans: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise EngineError("MARKERWORD")

    with served(traces=True) as client:
        monkeypatch.setattr("sdxl_trt.server.desk.studio.Studio.decode", fails)
        client.post("/v1/images/generations", json=ASKED)
        client.post("/v1/images/generations", json={**ASKED, "size": "MARKERWORD"})
        client.get("/MARKERWORD?MARKERWORD")
    made = spans.get_finished_spans()
    failed, refused = (span for span in made if span.name == "POST /v1/images/generations")
    assert failed.status.status_code is one(made, "generate").status.status_code is StatusCode.ERROR
    assert refused.status.status_code is StatusCode.UNSET
    assert (one(made, "GET").attributes or {})["http.response.status_code"] == 404
    for span in made:
        assert "MARKER" not in span.to_json()


def test_without_traces_no_sdk_is_imported_and_its_absence_is_one_line() -> None:
    code = """
import sys
sys.modules["opentelemetry.sdk"] = None
from sdxl_trt.server import Options, create_app
create_app(Options())
try:
    create_app(Options(traces=True))
except Exception as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (
        done.stdout
        == "--traces: OpenTelemetry's SDK is missing; install it with: pip install 'sdxl-trt[server,otel]'\n"
    )


def test_the_exporter_is_that_of_the_standard_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    create_app(Options(traces=True))
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "smoke")
    with pytest.raises(UsageError, match="OTEL_TRACES_EXPORTER=smoke"):
        create_app(Options(traces=True))
