"""The log of requests: one line of JSON each, with nothing in it that a client wrote but a request id."""

__all__ = ["log_job", "log_request"]

import json
import logging
from datetime import UTC, datetime

from sdxl_trt.server.http import Caller, Finished

log = logging.getLogger("sdxl_trt.server.requests")
_QUIET = ("ops",)
_NOTES = (
    "size", "steps", "pictures", "sampler", "queue_s", "encode_s", "swap_s", "base_s", "refiner_s", "decode_s",
    "cancelled", "trace_id",
)  # fmt: skip
"""The notes of a caller that are logged: numbers, sizes, and names out of our own lists."""


def log_request(finished: Finished) -> None:
    """Log a request that was answered; what asks for health and metrics is not logged unless it failed.

    A server that says that it is not ready has not failed.
    """
    if finished.owner in _QUIET and finished.method == "GET" and (0 < finished.status < 500 or finished.status == 503):
        return
    about = {
        "api": finished.owner,
        "method": finished.method,
        "route": finished.route,
        "status": finished.status,
        "seconds": round(finished.seconds, 3),
    }
    if not finished.status:
        finished.caller.notes.setdefault("cancelled", True)
    _log(finished.caller, about)


def log_job(caller: Caller, outcome: str) -> None:
    """Log the end of a job whose request, of `caller`, was answered before."""
    _log(caller, {"api": "comfyui", "job": outcome})


def _log(caller: Caller, about: dict[str, object]) -> None:
    noted = {name: caller.notes[name] for name in _NOTES if name in caller.notes}
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in noted.items()}
    log.info("%s", json.dumps({"time": time, "id": caller.id, "who": caller.who, **about, **rounded,
                               "warnings": len(caller.warnings)}))  # fmt: skip
