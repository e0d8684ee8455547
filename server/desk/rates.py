"""How much one key may ask for: token buckets of requests and of predicted seconds of the device."""

__all__ = ["Allowance", "Rates"]

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from sdxl_trt.server.refusals import TooMany

MINUTE = 60.0
MOST_OWNERS = 10_000
"""Owners that are remembered; whoever is forgotten starts with full buckets."""


@dataclass(frozen=True)
class Allowance:
    """What a key may ask for: the `limit` of requests a minute, those `remaining`, and seconds until all are back."""

    limit: int
    remaining: int
    reset: float


@dataclass
class _Bucket:
    requests: float
    seconds: float
    at: float


class Rates:
    """Two buckets for each owner, filled over a minute; None is no limit. It belongs to the event loop."""

    def __init__(
        self, requests: int | None = None, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._requests = math.inf if requests is None else float(requests)
        self._seconds = math.inf if seconds is None else seconds
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, who: str, seconds: float) -> None:
        """Take a request of predicted `seconds` from the buckets of `who`, or raise TooMany and take nothing.

        A request of more seconds than the bucket holds is taken from a full one, which then owes the rest.
        """
        bucket = self._filled(who)
        needed = min(seconds, self._seconds)
        missing = max(_missing(1.0, bucket.requests, self._requests), _missing(needed, bucket.seconds, self._seconds))
        if missing > 0:
            raise TooMany("this key has asked for as much as it may in a minute; try again later", math.ceil(missing))
        bucket.requests -= 1.0
        bucket.seconds -= seconds

    def give_back(self, who: str, seconds: float) -> None:
        """Undo `take`: the request was refused for another reason."""
        bucket = self._filled(who)
        bucket.requests = min(bucket.requests + 1.0, self._requests)
        bucket.seconds = min(bucket.seconds + seconds, self._seconds)

    def allowance(self, who: str) -> Allowance | None:
        """Return what `who` may still ask for; None if requests are not limited."""
        if math.isinf(self._requests):
            return None
        left = self._filled(who).requests
        return Allowance(int(self._requests), max(int(left), 0), (self._requests - left) * MINUTE / self._requests)

    def _filled(self, who: str) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.pop(who, None) or _Bucket(self._requests, self._seconds, now)
        share, bucket.at = (now - bucket.at) / MINUTE, now
        if share > 0:
            bucket.requests = min(self._requests, bucket.requests + share * self._requests)
            bucket.seconds = min(self._seconds, bucket.seconds + share * self._seconds)
        self._buckets[who] = bucket  # the latest last
        if len(self._buckets) > MOST_OWNERS:
            del self._buckets[next(iter(self._buckets))]
        return bucket


def _missing(needed: float, there: float, limit: float) -> float:
    """Return the seconds until a bucket holds what is `needed`."""
    return 0.0 if math.isinf(limit) or there >= needed else (needed - there) * MINUTE / limit
