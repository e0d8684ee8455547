"""What the desk knows at the moment at which Prometheus asks."""

__all__ = ["DeskGauges"]

from collections.abc import Iterator

from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from sdxl_trt.server.desk import Desk
from sdxl_trt.server.ops.bundles import digest_of


class DeskGauges(Collector):
    """The queue, the engines and the device of one desk; they are asked for on its event loop."""

    def __init__(self, desk: Desk, version: str) -> None:
        self._desk, self._version = desk, version

    def describe(self) -> list[Metric]:
        """Return nothing: the registry then asks for no values before somebody reads them."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges."""
        yield from self._queue()
        yield from self._engines()

    def _queue(self) -> Iterator[Metric]:
        desk = self._desk
        yield GaugeMetricFamily("trt_ready", "Whether new work is taken.", float(bool(desk.ready)))
        depth = GaugeMetricFamily("trt_queue_depth", "Requests that wait.", labels=["state"])
        depth.add_metric(["waiting"], desk.waiting())
        yield depth
        inflight = GaugeMetricFamily("trt_inflight_pictures", "Pictures that are not finished, by where they are.",
                                     labels=["state"])  # fmt: skip
        for state, count in desk.counts().items():
            inflight.add_metric([state], count)
        yield inflight
        yield GaugeMetricFamily("trt_oldest_wait_seconds", "How long the oldest request has waited that nobody has"
                                " begun with.", desk.oldest_wait())  # fmt: skip

    def _engines(self) -> Iterator[Metric]:
        pool, manifest = self._desk.pipeline.pool, self._desk.pipeline.manifest
        loaded = GaugeMetricFamily("trt_engine_loaded", "Whether the engine of a component is loaded.",
                                   labels=["engine"])  # fmt: skip
        held = {*pool.loaded}
        for name in manifest.components:
            loaded.add_metric([name], float(name in held))
        yield loaded
        if (memory := pool.memory()) is not None:
            free, total = memory
            used = GaugeMetricFamily("trt_gpu_memory_used_bytes", "Memory of the GPU in use, of all processes.",
                                     labels=["device"])  # fmt: skip
            used.add_metric(["0"], total - free)
            yield used
        about = {"version": self._version, "bundle": digest_of(manifest), "provider": pool.provider,
                 "residency": pool.residency, "computes": pool.computes or ""}  # fmt: skip
        yield InfoMetricFamily("trt_build", "What runs.", about)
