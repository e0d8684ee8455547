"""Figures compared with their bars, and the table of bars at the top of every report."""

__all__ = ["NOT_MEASURED", "VERDICTS", "Bar", "at_least", "at_most", "bars_table", "missed"]

from collections.abc import Callable, Iterable

import msgspec

NOT_MEASURED = "not measured"
VERDICTS = {True: "yes", False: "no", None: "-"}


class Bar(msgspec.Struct, frozen=True):
    """A figure and the bar it must meet; `met` is None if the figure could not be measured."""

    what: str
    bar: str
    value: str
    met: bool | None


def at_most(what: str, value: float | None, limit: float, bar: str, show: Callable[[float], str]) -> Bar:
    """Return the bar `value` <= `limit`; `bar` is the limit in words, a `value` of None was not measured."""
    if value is None:
        return Bar(what, f"<= {bar}", NOT_MEASURED, None)
    return Bar(what, f"<= {bar}", show(value), value <= limit)


def at_least(what: str, value: float | None, limit: float, bar: str, show: Callable[[float], str]) -> Bar:
    """Return the bar `value` >= `limit`, as `at_most` does."""
    if value is None:
        return Bar(what, f">= {bar}", NOT_MEASURED, None)
    return Bar(what, f">= {bar}", show(value), value >= limit)


def missed(bars: Iterable[Bar]) -> bool:
    """Return whether any bar was missed; a bar that was not measured does not count as missed."""
    return any(bar.met is False for bar in bars)


def bars_table(bars: Iterable[Bar]) -> list[str]:
    """Return the bars as the lines of a Markdown table; missed ones are bold."""
    lines = ["| | bar | measured | met |", "|---|---|---|---|"]
    for bar in bars:
        verdict = f"**{VERDICTS[bar.met]}**" if bar.met is False else VERDICTS[bar.met]
        lines.append(f"| {bar.what} | {bar.bar} | {bar.value} | {verdict} |")
    return lines
