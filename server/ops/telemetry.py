"""Where spans go: OpenTelemetry's SDK, set up by its own environment variables. Imported for --traces alone."""

__all__ = ["open_traces"]

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.host import __version__
from sdxl_trt.server.ops.traces import Traces

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

SERVICE = "trt-serve"
_EXPORTERS = ("otlp", "console", "none")
_INSTALL = "install it with: pip install 'sdxl-trt[server,otel]'"


def open_traces(model: Callable[[], str]) -> Traces:
    """Return traces that are sent where OTEL_TRACES_EXPORTER says: otlp, over HTTP, unless it names another one.

    A provider that the process has already, as under opentelemetry-instrument, is used as it is. `model` returns the
    name of what draws. Raises UsageError for an exporter that is unknown or not installed.
    """
    try:
        from opentelemetry import trace  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ModuleNotFoundError as exc:
        raise UsageError(f"--traces: OpenTelemetry's SDK is missing; {_INSTALL}") from exc
    present = trace.get_tracer_provider()
    if not isinstance(present, trace.ProxyTracerProvider):
        return Traces(present.get_tracer(__package__, __version__), model)
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: SERVICE}))
    provider = TracerProvider(resource=resource)
    if (exporter := _exporter()) is not None:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return Traces(provider.get_tracer(__package__, __version__), model, close=provider.shutdown)


def _exporter() -> "SpanExporter | None":
    name = os.environ.get("OTEL_TRACES_EXPORTER", "otlp").strip() or "otlp"
    if name not in _EXPORTERS:
        raise UsageError(f"OTEL_TRACES_EXPORTER={name[:40]}: is not known here; give one of {', '.join(_EXPORTERS)}")
    if name == "none":
        return None
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter  # noqa: PLC0415

        return ConsoleSpanExporter()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    except ModuleNotFoundError as exc:
        raise UsageError(f"--traces: the exporter for OTLP is missing; {_INSTALL}") from exc
    exporter: SpanExporter = OTLPSpanExporter()
    return exporter
