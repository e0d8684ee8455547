"""A document before it is Markdown or HTML: sections of sentences, tables and commands, all plain text."""

__all__ = ["Section", "Table", "without_empty"]

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of texts under a `head`; the first `words` columns are words, the others figures.

    `ours` are the numbers of the rows that stand for this project. The last column of a `verdict` table says yes or no.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    words: int = 1
    ours: frozenset[int] = frozenset()
    verdict: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the document; `key` is its anchor, and `commands` are (what it does, command line)."""

    key: str
    title: str
    says: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    points: tuple[str, ...] = ()
    commands: tuple[tuple[str, str], ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing in it but its title and sentences about it."""
        return not (self.tables or self.points or self.commands)


def without_empty(
    head: Sequence[str], rows: Iterable[Sequence[str]]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return head and rows without the columns that no row has a text for; the other gaps get a dash."""
    all_rows = [tuple(row) for row in rows]
    kept = [column for column in range(len(head)) if column == 0 or any(row[column] for row in all_rows)]
    filled = tuple(tuple(row[column] or "–" for column in kept) for row in all_rows)
    return tuple(head[column] for column in kept), filled
