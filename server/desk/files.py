"""Finished pictures that are fetched later, under names that nobody can guess."""

__all__ = ["Files", "Stored"]

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

LIFETIME = 3600.0
"""Seconds for which a picture is kept."""
MOST_BYTES = 256 << 20


@dataclass(frozen=True)
class Stored:
    """A picture's file; `who` asked for it."""

    data: bytes
    media_type: str
    who: str
    expires: float


class Files:
    """At most `most` bytes of pictures in memory, for `lifetime` seconds; the oldest go first. Safe between threads."""

    def __init__(
        self, most: int = MOST_BYTES, lifetime: float = LIFETIME, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._lifetime, self._clock = most, lifetime, clock
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, data: bytes, media_type: str, who: str = "") -> str:
        """Store a picture's file; return its token, 32 hexadecimal digits. One larger than all may be is not kept."""
        token = secrets.token_hex(16)
        with self._lock:
            self._stored[token] = Stored(data, media_type, who, self._clock() + self._lifetime)
            self._bytes += len(data)
            self._clean()
        return token

    def get(self, token: str) -> Stored | None:
        """Return what is stored under `token`; None if it never was, or is no longer."""
        with self._lock:
            self._clean()
            return self._stored.get(token)

    @property
    def bytes(self) -> int:
        """Return the bytes of all files."""
        return self._bytes

    def _clean(self) -> None:
        now = self._clock()
        while self._stored:
            oldest = next(iter(self._stored.values()))
            if self._bytes <= self._most and oldest.expires > now:
                return
            self._stored.popitem(last=False)
            self._bytes -= len(oldest.data)
