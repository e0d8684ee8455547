"""Everything by which operators see a server: its log, its metrics and its traces, put together."""

__all__ = ["Operations"]

from collections import Counter

from starlette.types import ASGIApp

from sdxl_trt.engines.host import __version__
from sdxl_trt.server.desk import Desk
from sdxl_trt.server.http import Finished
from sdxl_trt.server.ops.logs import log_request
from sdxl_trt.server.ops.metrics import Metrics
from sdxl_trt.server.ops.orders import note_order
from sdxl_trt.server.ops.telemetry import open_traces
from sdxl_trt.server.options import Options

EMBEDDED = "sdxl-trt-embedded"


class Operations:
    """The log, metrics and traces of one server; `sockets` counts the open websockets of each caller.

    Raises UsageError if `options` ask for traces whose packages are missing.
    """

    def __init__(self, options: Options) -> None:
        self.sockets: Counter[str] = Counter()
        self.metrics = Metrics(self.sockets.total, __version__)
        self._options = options
        self._desk: Desk | None = None
        self._traces = open_traces(self._model) if options.traces else None

    def follow(self, desk: Desk) -> None:
        """See what becomes of the orders of `desk`."""
        self._desk = desk
        self.metrics.follow(desk)
        desk.on_order.append(note_order)
        if self._traces is not None:
            desk.on_order.append(self._traces.follow)

    def tell(self, finished: Finished) -> None:
        """Log and count a request that was answered."""
        log_request(finished)
        self.metrics.tell(finished)

    def allowance(self, who: str) -> tuple[int, int, float] | None:
        """Return the requests a minute that `who` may send, how many are left, and the seconds until all are back."""
        allowed = self._desk.rates.allowance(who) if self._desk is not None else None
        return None if allowed is None else (allowed.limit, allowed.remaining, allowed.reset)

    def traced(self, app: ASGIApp) -> ASGIApp:
        """Return `app` with a span around each request, or itself without traces."""
        return app if self._traces is None else self._traces.middleware(app)

    def close(self) -> None:
        """Send the spans that are left."""
        if self._traces is not None:
            self._traces.close()

    def _model(self) -> str:
        if self._options.engines is None or self._desk is None:
            return EMBEDDED
        return self._desk.pipeline.pool.bundle.root.name
