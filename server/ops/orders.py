"""What becomes of the orders of a request, for the line that is logged of it."""

__all__ = ["note_order"]

from sdxl_trt.runtime.request import ResolvedRequest
from sdxl_trt.server.desk import Drawn, Ended, Event, Stepped, Ticket
from sdxl_trt.server.http import Caller, current_caller
from sdxl_trt.server.ops.logs import log_job

_SECONDS = {"queue": "queue_s", "encode": "encode_s", "load": "swap_s", "base": "base_s", "refiner": "refiner_s",
            "decode": "decode_s"}  # fmt: skip


def note_order(ticket: Ticket, resolved: ResolvedRequest | None) -> None:
    """Note for the request that is answered now what it asked for, and what its order took when it has ended.

    ComfyUI's requests are answered before their jobs begin: a job's end is logged in a line of its own.
    """
    caller = current_caller.get()
    if caller is None:
        return
    if resolved is not None:
        _note_request(caller, resolved)
    following = _Following(caller, counted=resolved is not None)
    ticket.listeners.append(lambda event: following.hear(ticket, event))


def _note_request(caller: Caller, resolved: ResolvedRequest) -> None:
    caller.notes["size"] = f"{resolved.width}x{resolved.height}"
    caller.notes["sampler"] = resolved.request.sampler
    steps = resolved.base.steps if not resolved.refiner_only else 0
    _add(caller, "steps", steps + (resolved.refiner.steps if resolved.refiner is not None else 0))
    _add(caller, "pictures", len(resolved.seeds))


class _Following:
    """Notes what an order's events say; with `counted`, its request has said how many steps and pictures it has."""

    def __init__(self, caller: Caller, *, counted: bool) -> None:
        self._caller, self._counted = caller, counted

    def hear(self, ticket: Ticket, event: Event) -> None:
        if not self._counted:
            self._count(event)
        if isinstance(event, Ended):
            for stage, seconds in event.seconds.items():
                if stage in _SECONDS:
                    _add(self._caller, _SECONDS[stage], round(seconds, 3))
            self._caller.notes["cancelled"] = event.outcome in ("cancelled", "interrupted")
            if ticket.order.api == "comfyui":
                log_job(self._caller, event.outcome)

    def _count(self, event: Event) -> None:
        if isinstance(event, Stepped) and event.stage in ("base", "refiner"):
            _add(self._caller, "steps", 1)
        elif isinstance(event, Drawn):
            _add(self._caller, "pictures", 1)
            self._caller.notes["size"] = "x".join(map(str, event.picture.image.size))


def _add(caller: Caller, name: str, value: float) -> None:
    before = caller.notes.get(name, 0)
    caller.notes[name] = (before if isinstance(before, int | float) else 0) + value
