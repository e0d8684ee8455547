"""A figure held against its bar, and the table of them that stands first in every report."""

__all__ = ["NOT_MEASURED", "VERDICTS", "Bar", "at_most", "bars_table", "missed"]

from collections.abc import Callable, Iterable

import msgspec

NOT_MEASURED = "not measured"
VERDICTS = {True: "yes", False: "no", None: "-"}


class Bar(msgspec.Struct, frozen=True):
    """A figure held against its bar; `met` is None where it could not be measured."""

    what: str
    bar: str
    value: str
    met: bool | None


def at_most(what: str, value: float | None, limit: float, bar: str, show: Callable[[float], str]) -> Bar:
    """Hold `value` against `limit`, which `bar` says in words; None is a figure that could not be measured."""
    if value is None:
        return Bar(what, f"<= {bar}", NOT_MEASURED, None)
    return Bar(what, f"<= {bar}", show(value), value <= limit)


def missed(bars: Iterable[Bar]) -> bool:
    """Return whether a bar was missed; one that could not be measured was not."""
    return any(bar.met is False for bar in bars)


def bars_table(bars: Iterable[Bar]) -> list[str]:
    """Return the bars as the lines of a Markdown table; a missed one stands out."""
    lines = ["| | bar | measured | met |", "|---|---|---|---|"]
    for bar in bars:
        verdict = f"**{VERDICTS[bar.met]}**" if bar.met is False else VERDICTS[bar.met]
        lines.append(f"| {bar.what} | {bar.bar} | {bar.value} | {verdict} |")
    return lines
