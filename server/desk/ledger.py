"""What becomes of the orders on the worker's side: their open pieces, their seconds, and how they end."""

__all__ = ["Ledger"]

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.runtime import Step
from sdxl_trt.server.desk.orders import Drawn, Ended, Outcome, Stepped
from sdxl_trt.server.desk.pieces import Piece
from sdxl_trt.server.desk.ticket import Ticket

OnEnd = Callable[[Ticket, Ended], None]


@dataclass
class _Account:
    open: set[Piece] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=dict)
    started: float | None = None


class Ledger:
    """The orders that have pieces with the worker. `on_end` is called once for each, on the worker's thread.

    Only the worker uses it, except for `enter` and `strike`, which the desk calls under the worker's lock.
    """

    def __init__(self, on_end: OnEnd) -> None:
        self._accounts: dict[Ticket, _Account] = {}
        self._on_end = on_end

    def enter(self, pieces: Sequence[Piece]) -> None:
        """Open an account for an order of these pieces."""
        self._accounts[pieces[0].ticket] = _Account(set(pieces))

    def strike(self, ticket: Ticket) -> list[Piece]:
        """Forget an order; return the pieces that were open."""
        account = self._accounts.pop(ticket, None)
        return [] if account is None else [*account.open]

    def has_begun(self, ticket: Ticket) -> bool:
        """Return whether the worker has begun with an order."""
        account = self._accounts.get(ticket)
        return account is None or account.started is not None

    def pieces(self) -> list[Piece]:
        """Return all open pieces."""
        return [piece for account in self._accounts.values() for piece in account.open]

    def begin(self, pieces: Iterable[Piece]) -> None:
        """State that the worker begins with these pieces."""
        for ticket in _tickets(pieces):
            account = self._accounts.get(ticket)
            if account is not None and account.started is None:
                account.started = time.monotonic()
                account.seconds["queue"] = account.started - ticket.created
                ticket.begin()

    def spend(self, pieces: Iterable[Piece], stage: str, seconds: float) -> None:
        """Add seconds of work that the pieces waited for together: once to each order."""
        for ticket in _tickets(pieces):
            account = self._accounts.get(ticket)
            if account is not None:
                account.seconds[stage] = account.seconds.get(stage, 0.0) + seconds

    def stepped(self, piece: Piece, step: Step) -> None:
        """Tell of a step of a piece, and keep its estimate."""
        if step.denoised is not None:
            if piece.estimate is None:
                piece.estimate = step.denoised.copy() if piece.task.pictures == 1 else _like(piece)
            piece.estimate[step.pictures if piece.task.pictures > 1 else slice(0, 1)] = step.denoised
        shown = step.denoised.copy() if step.denoised is not None and piece.ticket.order.wants_estimates else None
        stage = "encode" if step.stage == "picture" else step.stage
        first, pictures = piece.first + step.pictures.start, step.pictures.stop - step.pictures.start
        told = Stepped(stage, step.index, step.total, first, shown, pictures=pictures, seconds=step.seconds)
        piece.ticket.tell(told)

    def drawn(self, piece: Piece, step: Step) -> None:
        """Tell of a finished picture."""
        assert step.picture is not None  # noqa: S101 - it was decoded
        piece.ticket.tell(Drawn(piece.first + step.pictures.start, step.picture, seconds=step.seconds))

    def close(self, piece: Piece) -> None:
        """State that nothing more is done for a piece; the last one of an order ends it."""
        account = self._accounts.get(piece.ticket)
        if account is None:
            return
        account.open.discard(piece)
        if not account.open:
            outcome: Outcome = "done"
            if piece.ticket.stop is not None:
                outcome = "interrupted" if piece.ticket.stop == "interrupted" else "cancelled"
            self.end(piece.ticket, outcome)

    def end(self, ticket: Ticket, outcome: Outcome, error: Exception | None = None) -> list[Piece]:
        """End an order; return the pieces that were still open."""
        account = self._accounts.pop(ticket, None)
        if account is None:
            return []
        self._on_end(ticket, Ended(outcome, error, dict(account.seconds)))
        return [*account.open]

    def seconds(self, ticket: Ticket) -> dict[str, float]:
        """Return the seconds of an order by stage so far."""
        account = self._accounts.get(ticket)
        return {} if account is None else dict(account.seconds)


def _tickets(pieces: Iterable[Piece]) -> list[Ticket]:
    return [*dict.fromkeys(piece.ticket for piece in pieces)]


def _like(piece: Piece) -> NDArray[np.float32]:
    """Return the estimates of a piece of several pictures before its first step: its latents."""
    assert piece.job is not None  # noqa: S101 - it takes steps
    return piece.job.latents.copy()
