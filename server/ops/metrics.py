"""Metrics for Prometheus: labels are from closed sets, and none holds what a client wrote."""

__all__ = ["Metrics"]

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0

from sdxl_trt.runtime.request import ResolvedRequest
from sdxl_trt.server.desk import Desk, Drawn, Ended, Event, Stepped, Ticket
from sdxl_trt.server.http import Finished
from sdxl_trt.server.ops.gauges import DeskGauges
from sdxl_trt.server.refusals import QueueFull, RefusedError, TooLate, TooMany

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
ROWS = (1, 2, 4, 8, 16, 32)
SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75)
STAGES = ("picture", "encode", "swap_base", "base", "swap_refiner", "refiner", "load", "decode")
EXPERTS = ("base", "refiner")
REASONS: dict[type[RefusedError], str] = {QueueFull: "queue", TooMany: "rate", TooLate: "deadline"}
"""Why an order is not taken; a body that is too large is "size"."""


class Metrics:
    """The metrics of one server; `sockets` counts its open websockets."""

    def __init__(self, sockets: Callable[[], int], version: str) -> None:
        self._registry = registry = CollectorRegistry()
        self._version = version
        self._requests = Counter("trt_requests", "Requests that were answered.", ("api", "route", "status", "outcome"),
                                 registry=registry)  # fmt: skip
        self._seconds = _seconds("trt_request_duration_seconds", "From a request's first byte to its last.", "api",
                                 registry)  # fmt: skip
        self._queue = _seconds("trt_queue_duration_seconds", "Until the worker began with an order.", "api", registry)
        self._stages = _seconds("trt_stage_duration_seconds", "One stage of a piece of work.", "stage", registry)
        self._steps = _seconds("trt_step_duration_seconds", "One step, as each of its pictures waited for it.", "stage",
                               registry)  # fmt: skip
        self._rows = Histogram("trt_batch_rows", "Rows of a common call of a UNet that pictures used.", ("stage",),
                               buckets=ROWS, registry=registry)  # fmt: skip
        self._padding = Histogram("trt_batch_padding_ratio", "The share of a call's rows that no picture used.",
                                  ("stage",), buckets=SHARES, registry=registry)  # fmt: skip
        self._pictures = Counter("trt_pictures", "Pictures that were drawn.", registry=registry)
        self._steps_done = Counter("trt_steps", "Steps that were taken, of each picture.", ("stage",),
                                   registry=registry)  # fmt: skip
        self._rejected = Counter("trt_rejected", "Requests that were not taken.", ("reason",), registry=registry)
        Gauge("trt_websockets", "Open websockets.", registry=registry).set_function(sockets)
        self._begin()

    def _begin(self) -> None:
        """Have every label of a small set in the first answer: what has not happened is 0, and not missing."""
        for reason in (*REASONS.values(), "size"):
            self._rejected.labels(reason)
        for expert in EXPERTS:
            self._steps_done.labels(expert)

    def follow(self, desk: Desk) -> None:
        """Measure what becomes of the orders of `desk`."""
        self._registry.register(DeskGauges(desk, self._version))
        desk.on_stage.append(self._stage)
        desk.on_call.append(self._call)
        desk.on_order.append(self._order)
        desk.on_refused.append(self._refused)

    def tell(self, finished: Finished) -> None:
        """Count a request that was answered."""
        status = f"{finished.status // 100}xx" if finished.status else "none"
        self._requests.labels(finished.owner, finished.route or "none", status, _outcome(finished.status)).inc()
        if finished.owner != "ops":
            self._seconds.labels(finished.owner).observe(finished.seconds)
        if finished.status == 413:
            self._rejected.labels("size").inc()

    def _stage(self, stage: str, seconds: float) -> None:
        if stage in STAGES:
            self._stages.labels(stage).observe(seconds)

    def _call(self, stage: str, used: int, rows: int) -> None:
        self._rows.labels(stage).observe(used)
        self._padding.labels(stage).observe((rows - used) / rows)

    def _refused(self, exc: RefusedError) -> None:
        if type(exc) in REASONS:
            self._rejected.labels(REASONS[type(exc)]).inc()

    def _order(self, ticket: Ticket, _: ResolvedRequest | None) -> None:
        ticket.listeners.append(lambda event: self._event(ticket, event))

    def _event(self, ticket: Ticket, event: Event) -> None:
        if isinstance(event, Drawn):
            self._pictures.inc()
        elif isinstance(event, Stepped) and event.stage in EXPERTS:
            self._steps_done.labels(event.stage).inc(event.pictures)
            self._steps.labels(event.stage).observe(event.seconds)
        elif isinstance(event, Ended) and "queue" in event.seconds:
            self._queue.labels(ticket.order.api).observe(event.seconds["queue"])

    def text(self) -> tuple[bytes, str]:
        """Return the metrics as Prometheus reads them, and their media type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_1_0_0


def _seconds(name: str, what: str, label: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(name, what, (label,), buckets=SECONDS, registry=registry)


def _outcome(status: int) -> str:
    if status == 0:
        return "cancelled"
    if status < 400:
        return "ok"
    if status == 504:
        return "deadline"
    return "refused" if status < 500 or status == 503 else "error"
