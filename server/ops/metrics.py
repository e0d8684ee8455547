"""Metrics for Prometheus: no label holds what a client wrote."""

__all__ = ["Metrics"]

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sdxl_trt.server.desk import Desk
from sdxl_trt.server.http import Finished
from sdxl_trt.server.ops.health import readiness

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STATES = ("waiting", "base", "handed_over", "refiner")
_REASONS = {413: "size", 429: "queue", 504: "deadline"}


class Metrics:
    """The metrics of one server; `sockets` counts its open websockets."""

    def __init__(self, desk: Callable[[], Desk | None], sockets: Callable[[], int], version: str) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("trt_requests", "Requests that were answered.", ("api", "route", "status", "outcome"),
                                 registry=self._registry)  # fmt: skip
        self._seconds = Histogram("trt_request_duration_seconds", "From the first byte to the last.", ("api",),
                                  buckets=SECONDS, registry=self._registry)  # fmt: skip
        self._stages = Histogram("trt_stage_duration_seconds", "Work of one stage.", ("stage",), buckets=SECONDS,
                                 registry=self._registry)  # fmt: skip
        self._rows = Histogram("trt_batch_rows", "Pictures that shared one call.", ("stage",),
                               buckets=(1, 2, 4, 8, 16, 32), registry=self._registry)  # fmt: skip
        self._rejected = Counter("trt_rejected", "Requests that were not taken.", ("reason",), registry=self._registry)
        Gauge("trt_websockets", "Open websockets.", registry=self._registry).set_function(sockets)
        Info("trt_build", "What runs.", registry=self._registry).info({"version": version})
        self._registry.register(_Desk(desk))

    def tell(self, finished: Finished) -> None:
        """Count a request that was answered."""
        status = f"{finished.status // 100}xx" if finished.status else "none"
        self._requests.labels(finished.owner, finished.route or "none", status, _outcome(finished.status)).inc()
        if finished.owner != "ops":
            self._seconds.labels(finished.owner).observe(finished.seconds)
        if finished.status in _REASONS:
            self._rejected.labels(_REASONS[finished.status]).inc()

    def unit(self, stage: str, seconds: float, rows: int) -> None:
        """Count a unit of the desk's work."""
        self._stages.labels(stage).observe(seconds)
        self._rows.labels(stage).observe(rows)

    def text(self) -> tuple[bytes, str]:
        """Return the metrics as Prometheus reads them, and their media type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_1_0_0


class _Desk(Collector):
    """What the desk knows at the moment of the question."""

    def __init__(self, desk: Callable[[], Desk | None]) -> None:
        self._desk = desk

    def describe(self) -> list[Metric]:
        """Return nothing: the registry then asks for no value before there is a desk."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges of the desk."""
        desk = self._desk()
        yield GaugeMetricFamily("trt_ready", "Whether new work is taken.",
                                value=float(desk is not None and readiness(desk)[0]))  # fmt: skip
        if desk is None:
            return
        queue = GaugeMetricFamily("trt_queue_depth", "Requests, by what they wait for.", labels=["state"])
        for state, count in _counts(desk).items():
            queue.add_metric([state], count)
        yield queue
        oldest = getattr(desk, "oldest_wait", None)
        if oldest is not None:
            yield GaugeMetricFamily("trt_oldest_wait_seconds", "Of those that wait.", value=oldest())


def _counts(desk: Desk) -> dict[str, int]:
    counts = getattr(desk, "counts", None)
    found = counts() if counts is not None else {"waiting": desk.waiting()}
    return {state: found.get(state, 0) for state in _STATES}


def _outcome(status: int) -> str:
    if status == 0:
        return "cancelled"
    if status < 400:
        return "ok"
    if status == 504:
        return "deadline"
    return "refused" if status < 500 or status == 503 else "error"
