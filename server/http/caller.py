"""Who calls: what the middleware learns of a request, for every API."""

__all__ = ["Caller", "current_caller"]

from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Caller:
    """The `request.state.caller` of every request, and of every websocket.

    `who` is "key:" and the first eight digits of the key's SHA-256, or "peer:" and the address without keys. `id` is
    the request id. `warnings` become the header X-TRT-Warnings; `notes` are fields for the log line of the request.
    """

    who: str
    id: str
    warnings: list[str] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)


current_caller: ContextVar[Caller | None] = ContextVar("current_caller", default=None)
"""The caller whose request the running task answers; None outside of requests."""
