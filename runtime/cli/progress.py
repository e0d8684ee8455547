"""A progress bar on stderr that tells the stage; silent where nobody watches."""

__all__ = ["ProgressBar"]

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from sdxl_trt.engines.host import CLEAR_LINE

WIDTH = 24
LABELS = {
    "picture": "reading pictures", "encode": "reading the prompt", "load": "loading", "base": "base",
    "refiner": "refiner", "decode": "decoding",
}  # fmt: skip


class ProgressBar:
    """Draws one line that is rewritten in place; draws nothing unless `stream` is a terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._drawn = False
        self._started = time.perf_counter()

    def show(self, stage: str, index: int, total: int, seconds: float) -> None:
        """Show that `index` of `total` units of `stage` are done, the last one in `seconds`."""
        if not self._live:
            return
        filled = WIDTH * index // total
        bar = "━" * filled + "╌" * (WIDTH - filled)
        rate = f"{1 / seconds:.1f} steps/s" if stage in ("base", "refiner") and seconds > 0 else ""
        elapsed = time.perf_counter() - self._started
        line = f"{LABELS.get(stage, stage):>18} {bar} {index}/{total}  {elapsed:.1f} s  {rate}"
        self._stream.write(CLEAR_LINE + line)
        self._stream.flush()
        self._drawn = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._drawn:
            self._stream.write(CLEAR_LINE)
            self._stream.flush()
