"""Pictures that are answered as URLs: kept in memory for an hour under names that nobody can guess."""

__all__ = ["Files"]

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

LIFETIME = 3600.0
"""Seconds, as OpenAI's own URLs live."""
MOST_BYTES = 256 << 20
TOKEN_BYTES = 16


@dataclass(frozen=True)
class _Kept:
    data: bytes
    until: float


class Files:
    """At most `most` bytes of pictures; the oldest go first. It may be used by several threads."""

    def __init__(self, most: int = MOST_BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, data: bytes, extension: str) -> str:
        """Keep a picture's file; return its name, which ends in `extension`."""
        name = f"{secrets.token_hex(TOKEN_BYTES)}.{extension}"
        with self._lock:
            self._kept[name] = _Kept(data, self._clock() + LIFETIME)
            self._bytes += len(data)
            self._drop()
        return name

    def get(self, name: str) -> bytes | None:
        """Return the file of a name; None if there is none, or it is too old."""
        with self._lock:
            self._drop()
            kept = self._kept.get(name)
        return None if kept is None else kept.data

    def _drop(self) -> None:
        now = self._clock()
        while self._kept:
            oldest = next(iter(self._kept.values()))
            if oldest.until > now and self._bytes <= self._most:
                return
            self._kept.popitem(last=False)
            self._bytes -= len(oldest.data)
