"""Why an order is not taken now, as the desk says it and each API tells it."""

__all__ = ["Draining", "NotReady", "QueueFull", "RefusedError", "TooLate", "TooMany"]


class RefusedError(Exception):
    """An order that the desk does not take now; `retry_after` is in whole seconds, from 1 to 120."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = min(max(retry_after, 1), 120)


class QueueFull(RefusedError):  # noqa: N818 - a reason, not a fault
    """As many orders wait as the queue takes."""


class TooLate(RefusedError):  # noqa: N818
    """The order cannot end before its deadline."""


class Draining(RefusedError):  # noqa: N818
    """The server is stopping."""


class NotReady(RefusedError):  # noqa: N818
    """No engine is loaded, or the latest probe failed."""


class TooMany(RefusedError):  # noqa: N818
    """The key has asked for more than it may in a minute."""
