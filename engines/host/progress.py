"""The progress line of every command: drawn by tqdm on a terminal, silent elsewhere."""

__all__ = ["ProgressLine"]

import os
import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO

TEXT = "{desc} [{elapsed}]{bar}"  # the bar of an unknown total is blank, and cuts the line at the terminal's width
SHARE = "{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]"


class ProgressLine:
    """One line that is rewritten in place and cleared at the end; nothing is drawn unless `stream` is a terminal.

    `stream` is stderr by default. tqdm is imported for the first line that is drawn.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self.live = self._stream.isatty()
        self._bar: Any = None
        self._count: tuple[str, float | None] = ("", None)
        self._text = ""
        self._since = time.time()

    def draw(
        self, count: str, text: str, done: float = 0, total: float | None = None, *, unit: str = "", note: str = ""
    ) -> None:
        """Show `text`, and that `done` of `total` units are done.

        Time and rate start anew with another `count` or `total`, or if `done` falls. Without `total` the line is `text`
        and the time; without `unit` it has the percentage, but neither figures nor a rate.
        """
        if not self.live:
            return
        another = self._bar is None or (count, total) != self._count or done < self._bar.n
        if another:
            self.clear()
            self._bar = _tqdm(self._stream, text, total, unit)
            self._bar.start_t = self._since  # a step is reported when it is done
        self._bar.set_postfix_str(note, refresh=False)
        if another or text != self._text:
            self._bar.n = done
            self._bar.set_description_str(text)
        else:
            self._bar.update(done - self._bar.n)
        self._count, self._text, self._since = (count, total), text, time.time()

    def clear(self) -> None:
        """Take the line off the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.clear()


def _tqdm(stream: TextIO, text: str, total: float | None, unit: str) -> Any:
    from tqdm import tqdm  # noqa: PLC0415 - nobody waits for it without a terminal

    form = TEXT if total is None else None if unit else SHARE
    size = {"dynamic_ncols": True} if _has_size(stream) else {"ncols": 79, "nrows": 24}
    return tqdm(desc=text, total=total, unit=unit, unit_scale=unit == "B", bar_format=form, file=stream, leave=False,
                miniters=0, smoothing=0, **size)  # fmt: skip


def _has_size(stream: TextIO) -> bool:
    """Return whether the terminal has a width: tqdm draws nothing on one of no columns, as containers make them."""
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return False
