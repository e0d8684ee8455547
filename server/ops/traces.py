"""Spans of OpenTelemetry: a request, what it has drawn, and each stage of it. No prompt, key or path is in them.

Nothing of OpenTelemetry's SDK is imported here: an instance is made of a tracer.
"""

__all__ = ["Traces"]

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdxl_trt.runtime.request import ResolvedRequest
from sdxl_trt.server.desk import Drawn, Ended, Event, Stepped, Ticket
from sdxl_trt.server.http import current_caller

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")
_STAGES = {"load": "swap", "picture": "encode"}
_PROBES = ("/health", "/healthz", "/v2/health", "/metrics")
LARGEST = (1 << 63) - 1
"""The largest whole number of an attribute; a seed beyond it is text."""


class Traces:
    """Makes spans with `tracer`: `middleware` those of requests, `follow` those of orders. `model` is what draws."""

    def __init__(self, tracer: "Tracer", model: Callable[[], str], close: Callable[[], None] = lambda: None) -> None:
        from opentelemetry import context, trace  # noqa: PLC0415 - an extra
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        self._tracer, self._model, self.close = tracer, model, close
        self._context, self._trace, self._propagator = context, trace, TraceContextTextMapPropagator()

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """Return `app` with a server span around each request; those of probes have none."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] not in ("http", "websocket") or scope["path"].startswith(_PROBES):
                await app(scope, receive, send)
            else:
                await self._request(app, scope, receive, send)

        return traced

    async def _request(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        method = scope.get("method", "GET")
        method = method if method in _METHODS else "_OTHER"
        span = self._tracer.start_span(
            method, self._propagator.extract(carrier), self._trace.SpanKind.SERVER,
            {"http.request.method": method, "url.scheme": scope["scheme"], "network.protocol.version":
             scope.get("http_version", "1.1")},
        )  # fmt: skip
        within = self._trace.set_span_in_context(span)
        answer = _Answer(send, lambda told: self._propagator.inject(told, within))
        token = self._context.attach(within)
        try:
            await app(scope, receive, answer)
        finally:
            self._context.detach(token)
            self._end(span, method, scope, answer.status)

    def _end(self, span: "Span", method: str, scope: Scope, status: int) -> None:
        if route := getattr(scope.get("route"), "path", ""):
            span.update_name(f"{method} {route}")
            span.set_attribute("http.route", route)
        if status:
            span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_attribute("error.type", str(status))
            span.set_status(self._trace.StatusCode.ERROR)
        span.end()

    def follow(self, ticket: Ticket, resolved: ResolvedRequest | None) -> None:
        """Make the spans of an order, below that of the request which the running task answers."""
        about: dict[str, Any] = {
            "gen_ai.operation.name": "generate_content", "gen_ai.output.type": "image",
            "gen_ai.request.model": self._model(), "gen_ai.request.stream": ticket.order.wants_estimates,
        }  # fmt: skip
        if resolved is not None:
            seed = resolved.seeds[0]
            about["gen_ai.request.choice.count"] = len(resolved.seeds)
            about["gen_ai.request.seed"] = seed if seed <= LARGEST else str(seed)
        span = self._tracer.start_span("generate", attributes=about)
        caller = current_caller.get()
        if caller is not None:
            caller.notes["trace_id"] = format(span.get_span_context().trace_id, "032x")
        ticket.listeners.append(_Stages(self, span).hear)

    def stage(self, parent: "Span", stage: "_Stage") -> None:
        """Make the span of a stage that is over."""
        span = self._tracer.start_span(stage.name, self._trace.set_span_in_context(parent), start_time=stage.began)
        for at, index, total in stage.steps:
            span.add_event("step", {"index": index, "total": total}, at)
        span.end(stage.until)

    def end(self, span: "Span", outcome: str) -> None:
        """End the span of an order."""
        span.set_attribute("trt.outcome", outcome)
        if outcome in ("failed", "deadline"):
            span.set_attribute("error.type", outcome)
            span.set_status(self._trace.StatusCode.ERROR)
        span.end()


@dataclass
class _Stage:
    """A stage of an order; times are nanoseconds since 1970."""

    name: str
    began: int
    until: int
    steps: list[tuple[int, int, int]] = field(default_factory=list)


class _Stages:
    """Makes stages of the events of an order: neighbours of one stage are one span, waiting between them is none."""

    def __init__(self, traces: Traces, span: "Span") -> None:
        self._traces, self._span = traces, span
        now = time.time_ns()
        self._now = _Stage("queue", now, now)

    def hear(self, event: Event) -> None:
        """Take an event."""
        if isinstance(event, Ended):
            if self._now.name == "queue":
                self._now.until = time.time_ns()
            self._traces.stage(self._span, self._now)
            self._traces.end(self._span, event.outcome)
        elif isinstance(event, Drawn):
            self._worked("decode", event.seconds)
        elif isinstance(event, Stepped) and event.index:
            self._worked(_STAGES.get(event.stage, event.stage), event.seconds)
            if event.stage in ("base", "refiner"):
                self._now.steps.append((self._now.until, event.index, event.total))

    def _worked(self, name: str, seconds: float) -> None:
        """Take in that a unit of a stage ended now."""
        now = time.time_ns()
        if name != self._now.name:
            began = max(now - round(seconds * 1e9), self._now.until)
            if self._now.name == "queue":
                self._now.until = began
            self._traces.stage(self._span, self._now)
            self._now = _Stage(name, began, now)
        self._now.until = now


class _Answer:
    """The `send` of a request: adds traceparent to its answer, and remembers its status."""

    def __init__(self, send: Send, inject: Callable[[dict[str, str]], None]) -> None:
        self._send, self._inject, self.status = send, inject, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
            self.status = message.get("status", 101)
            message.setdefault("headers", [])
            told: dict[str, str] = {}
            self._inject(told)
            headers = MutableHeaders(scope=message)
            for name, value in told.items():
                headers[name] = value
        await self._send(message)
