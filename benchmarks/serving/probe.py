"""Watch a server from a process of its own: its memory, and how soon it says that it lives.

``python -m sdxl_trt.benchmarks.serving.probe PORT PID`` samples until its standard input is closed, and prints what it
saw. It is a process of its own, so that a busy client does not count as a slow server.
"""

__all__ = ["Seen", "main", "percentile", "slope", "watching"]

import http.client
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from sdxl_trt.engines.host import process_memory

EVERY = 0.05
SLOWEST = 30.0


class Seen(msgspec.Struct):
    """Seconds of each GET /health/live (SLOWEST if unanswered), and (seconds since the start, resident bytes)."""

    live: list[float] = []
    memory: list[tuple[float, int]] = []


@contextmanager
def watching(port: int, pid: int) -> Iterator[Seen]:
    """Watch a server; what was seen is complete after the block."""
    command = [sys.executable, "-m", "sdxl_trt.benchmarks.serving.probe", str(port), str(pid)]
    seen = Seen()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # noqa: S603
        try:
            yield seen
        finally:
            output, _ = process.communicate(b"")
            told = msgspec.json.decode(output, type=Seen)
            seen.live, seen.memory = told.live, told.memory


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` of the `values` do not exceed; NaN without values."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else math.nan


def slope(memory: Sequence[tuple[float, int]], warm: float = 0.0) -> float:
    """Return by how many bytes a second the memory grows, by least squares; NaN for fewer than two samples.

    The samples of the first share `warm` of the time do not count: they fill stores whose size is bounded.
    """
    end = max((at for at, _ in memory), default=0.0)
    memory = [sample for sample in memory if sample[0] >= warm * end]
    if len(memory) < 2:
        return math.nan
    times, sizes = zip(*memory, strict=True)
    middle, mean = sum(times) / len(times), sum(sizes) / len(sizes)
    spread = sum((at - middle) ** 2 for at in times)
    return sum((at - middle) * (size - mean) for at, size in memory) / spread if spread else math.nan


def main(argv: Sequence[str] | None = None) -> int:
    """Sample until standard input is closed."""
    port, pid = map(int, sys.argv[1:] if argv is None else argv)
    closed = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        closed.set()

    threading.Thread(target=wait, daemon=True).start()
    seen, began = Seen(), time.perf_counter()
    while not closed.wait(EVERY):
        asked = time.perf_counter()
        lives = _lives(port)
        seen.live.append(time.perf_counter() - asked if lives else SLOWEST)
        figures = process_memory(pid)
        seen.memory.append((asked - began, figures.get("RssAnon", 0) + figures.get("RssFile", 0)))
    sys.stdout.buffer.write(msgspec.json.encode(seen))
    return 0


def _lives(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SLOWEST)
    try:
        connection.request("GET", "/health/live")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    raise SystemExit(main())
