"""The log of requests: one line of JSON each, with nothing in it that a client wrote but a request id."""

__all__ = ["log_request"]

import json
import logging
from datetime import UTC, datetime

from sdxl_trt.server.http import Finished

log = logging.getLogger("sdxl_trt.server.requests")
_QUIET = ("ops",)
_NOTES = (
    "size", "steps", "pictures", "sampler", "queue_s", "encode_s", "base_s", "swap_s", "refiner_s", "decode_s",
    "cancelled",
)  # fmt: skip
"""The notes of a caller that are logged: numbers, sizes, and names out of our own lists."""


def log_request(finished: Finished) -> None:
    """Log a request that was answered; what asks for health and metrics is not logged unless it failed."""
    if finished.owner in _QUIET and 0 < finished.status < 500:
        return
    caller = finished.caller
    log.info("%s", json.dumps({
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": caller.id,
        "who": caller.who,
        "api": finished.owner,
        "method": finished.method,
        "route": finished.route,
        "status": finished.status,
        "seconds": round(finished.seconds, 3),
        **{name: caller.notes[name] for name in _NOTES if name in caller.notes},
        "warnings": len(caller.warnings),
    }))  # fmt: skip
