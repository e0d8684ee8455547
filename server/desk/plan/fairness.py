"""Whose turn it is: deficit round robin over keys, in predicted seconds of the device."""

__all__ = ["Fairness"]

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

TINY = 1e-9
"""Seconds that rounding may lose."""


class Owned(Protocol):
    """What the turns are about: `who` asked for it, it takes `seconds`, and must end by `deadline` (inf: whenever)."""

    @property
    def who(self) -> str: ...

    @property
    def seconds(self) -> float: ...

    @property
    def deadline(self) -> float: ...


O = TypeVar("O", bound=Owned)  # noqa: E741 - what is owned


class Fairness:
    """Deficit round robin: whoever has used least is next, and inside one `who` the earliest deadline.

    Every round gives each `who` that waits the seconds of the dearest picture at hand. What nobody used is lost as soon
    as a `who` has nothing waiting, so nobody saves turns.
    """

    def __init__(self) -> None:
        self._deficits: dict[str, float] = {}

    def copy(self) -> "Fairness":
        """Return another with the same deficits, to look ahead with."""
        other = Fairness()
        other._deficits = dict(self._deficits)
        return other

    def order(self, waiting: Iterable[O]) -> Iterator[O]:
        """Yield `waiting` in the order of their turns; `charge` those that are taken before the next is asked for."""
        queues: dict[str, deque[O]] = {}
        for each in sorted(waiting, key=lambda each: each.deadline):
            queues.setdefault(each.who, deque()).append(each)
        self._deficits = {who: self._deficits.get(who, 0.0) for who in queues}
        while queues:
            self._rounds({who: queue[0].seconds for who, queue in queues.items()})
            who = max(queues, key=lambda who: self._turn(who, queues[who][0].seconds))
            yield queues[who].popleft()
            if not queues[who]:
                del queues[who]

    def charge(self, taken: Owned) -> None:
        """Take the seconds of `taken` from its owner's share."""
        self._deficits[taken.who] = self._deficits.get(taken.who, 0.0) - taken.seconds

    def _turn(self, who: str, seconds: float) -> tuple[bool, float]:
        """Return how near the turn of `who` is: those that can afford `seconds` first, then those with most to use."""
        return self._deficits[who] >= seconds - TINY, self._deficits[who]

    def _rounds(self, heads: dict[str, float]) -> None:
        """Give as many rounds as the first owner needs to afford its next."""
        quantum = max([TINY, *heads.values()])
        rounds = min(math.ceil((seconds - TINY - self._deficits[who]) / quantum) for who, seconds in heads.items())
        if rounds > 0:
            for who in heads:
                self._deficits[who] += rounds * quantum
