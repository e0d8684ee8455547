"""Text for terminals, 100 columns wide: amounts, ranges, tables and paragraphs."""

__all__ = ["mebibytes", "paragraph", "span", "table"]

import textwrap
from collections.abc import Collection, Sequence

WIDTH = 100


def mebibytes(amount: int) -> str:
    """Return `amount` bytes in MiB, with one decimal below 100 MiB."""
    size = amount / (1 << 20)
    return f"{size:.1f} MiB" if size < 100 else f"{size:.0f} MiB"


def span(low: int, usual: int, high: int, noun: str) -> str:
    """Return a range as text; `noun` is plural: "1 row", "512 to 1280 pixels (tuned for 1024)"."""
    if low == high:
        return f"{low} {noun.removesuffix('s') if low == 1 else noun}"
    return f"{low} to {high} {noun}" + ("" if usual == high else f" (tuned for {usual})")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int]) -> list[str]:
    """Return lines of aligned columns; those in `right` are right-aligned, rows are indented below `head`."""
    indented = [[f"  {row[0]}", *row[1:]] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *indented, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return [line(head), *map(line, indented)]


def paragraph(label: str, text: str) -> list[str]:
    """Return `text` after `label`, wrapped at 100 columns and aligned after it (2 columns further if it is blank)."""
    indent = " " * (len(label) + (0 if label.strip() else 2))
    lines = textwrap.wrap(
        text, WIDTH, initial_indent=label, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return lines or [label.rstrip()]
