"""Contact sheets: captioned pictures on a plain background, under a heading with what they have in common."""

__all__ = ["Sheet", "contact_sheet", "draw_sheet"]

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

GROUND, INK, PALE, RULE = (250, 250, 248), (48, 48, 52), (122, 122, 126), (224, 224, 220)
MARGIN, GAP, ROW_GAP, BELOW_PICTURE = 32, 16, 26, 7
TEXT, LINE = 13, 18
"""The font size and line height of captions, in pixels."""
LARGE, LARGE_LINE = 18, 25
MEDIUM, MEDIUM_LINE = 15, 21
"""A heading is large if it fits into two lines, else medium."""
MOST_HEADING, MOST_ASIDE, MOST_CAPTION, MOST_TITLE = 8, 3, 2, 4
"""The most lines of each; a longer text ends in an ellipsis."""
SMALL_CELL, LARGE_CELL = 256, 384
"""Cell sizes of a sheet in pixels: small pictures are enlarged by an integer factor, large ones reduced."""
NARROWEST, WIDEST_TITLE = 512, 150
NARROWEST_LETTER = 2
MOST_CHARACTERS = 4_000
ELLIPSIS = " …"
FURTHER_CHARACTERS = "©«°±·»‘’“”…‹›™"


def contact_sheet(pictures: "Sequence[Image]", captions: Sequence[str], columns: int, cell: int = 192) -> "Image":
    """Return one image with `pictures` in rows of `columns`, each drawn `cell` pixels wide above its caption.

    Captions wrap to two lines; longer ones end in an ellipsis. Pictures may differ in size.
    """
    from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415 - Pillow is loaded with the first picture

    font = ImageFont.load_default(TEXT)
    margin, gap, line = 24, 14, 17
    heights = [round(cell * picture.height / picture.width) for picture in pictures]
    row_height = max(heights) + MOST_CAPTION * line + gap
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (2 * margin + columns * (cell + gap) - gap, 2 * margin + rows * row_height - gap), GROUND)
    draw = ImageDraw.Draw(page)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = margin + index % columns * (cell + gap), margin + index // columns * row_height
        page.paste(_scaled(picture, (cell, heights[index])), (left, top))
        for number, words in enumerate(_wrapped(caption, cell, font, MOST_CAPTION)):
            draw.text((left, top + heights[index] + 4 + number * line), words, font=font, fill=INK)
    return page


@dataclass(frozen=True)
class Sheet:
    """Pictures row by row for comparison: the heading states what they have in common, captions what differs.

    A caption has a dark and a pale line. Titles of `rows`, and `across` of columns, make the sheet a grid. `aside` and
    then `notes` are printed pale below the heading. Pictures may differ in size: all are scaled by the same factor.
    """

    pictures: "Sequence[Image]"
    captions: Sequence[tuple[str, str]]
    columns: int
    heading: str = ""
    aside: str = ""
    notes: str = ""
    rows: Sequence[str] = ()
    across: Sequence[str] = ()


def draw_sheet(sheet: Sheet) -> "Image":
    """Return the sheet as one image."""
    from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415 - Pillow is loaded with the first picture

    font = ImageFont.load_default(TEXT)
    grid = _Grid(sheet, font)
    width = max(grid.width, NARROWEST)
    head = _head(sheet, width)
    top = MARGIN + sum(line.height for line in head) + GAP
    page = Image.new("RGB", (width + 2 * MARGIN, top + GAP + grid.height + MARGIN), GROUND)
    draw = ImageDraw.Draw(page)
    at = MARGIN
    for line in head:
        draw.text((MARGIN, at), line.text, font=line.font, fill=line.colour)
        at += line.height
    draw.line((MARGIN, top, MARGIN + width, top), fill=RULE)
    grid.draw(page, draw, (MARGIN, top + GAP))
    return page


@dataclass(frozen=True)
class _Line:
    text: str
    font: Any
    colour: tuple[int, int, int]
    height: int


def _head(sheet: Sheet, width: int) -> list[_Line]:
    """Return the heading's lines for a sheet that is `width` pixels wide."""
    from PIL import ImageFont  # noqa: PLC0415 - Pillow is loaded with the first picture

    font, height = ImageFont.load_default(LARGE), LARGE_LINE
    heading = _wrapped(sheet.heading, width, font, MOST_HEADING)
    if len(heading) > 2:
        font, height = ImageFont.load_default(MEDIUM), MEDIUM_LINE
        heading = _wrapped(sheet.heading, width, font, MOST_HEADING)
    small = ImageFont.load_default(TEXT)
    pale = [*_wrapped(sheet.aside, width, small, MOST_ASIDE), *_wrapped(sheet.notes, width, small, MOST_ASIDE)]
    lines = [_Line(text, font, INK, height) for text in heading]
    # A small gap between the dark and the pale text.
    return [*lines, _Line("", small, PALE, GAP // 4), *(_Line(text, small, PALE, LINE) for text in pale)]


class _Grid:
    """The pictures of a sheet with their captions and titles; `width` and `height` are the total size."""

    def __init__(self, sheet: Sheet, font: "FreeTypeFont | ImageFont") -> None:
        self._sheet = sheet
        self._font = font
        scale = _scale(max(max(picture.size) for picture in sheet.pictures))
        self._sizes = [(round(wide * scale), round(high * scale)) for wide, high in (p.size for p in sheet.pictures)]
        cell = max(wide for wide, _ in self._sizes), max(high for _, high in self._sizes)
        texts = (*sheet.across, *(line for caption in sheet.captions for line in caption))
        widest = max(cell[0], *(round(font.getlength(text)) for text in texts))
        lines = max(sum(map(bool, caption)) for caption in sheet.captions)
        self._cell = cell
        self._pitch = widest + GAP, cell[1] + BELOW_PICTURE + lines * LINE + ROW_GAP
        self._rows = [_wrapped(row, WIDEST_TITLE, font, MOST_TITLE) for row in sheet.rows]
        titles = [round(font.getlength(line)) for row in self._rows for line in row]
        self._left = max(titles) + GAP if titles else 0
        self._top = LINE + BELOW_PICTURE if sheet.across else 0
        count = -(-len(sheet.pictures) // sheet.columns)
        self.width = self._left + sheet.columns * self._pitch[0] - GAP
        self.height = self._top + count * self._pitch[1] - ROW_GAP

    def draw(self, page: "Image", draw: "ImageDraw", corner: tuple[int, int]) -> None:
        """Draw the grid on `page`, below and right of `corner`."""
        left, top = corner[0] + self._left, corner[1] + self._top
        for column, title in enumerate(self._sheet.across):
            draw.text((left + column * self._pitch[0], corner[1]), title, font=self._font, fill=INK)
        for row, lines in enumerate(self._rows):
            # Vertically centred on the pictures.
            start = top + row * self._pitch[1] + (self._cell[1] - len(lines) * LINE) // 2
            for number, line in enumerate(lines):
                draw.text((corner[0], start + number * LINE), line, font=self._font, fill=INK)
        columns = self._sheet.columns
        for index, (picture, caption) in enumerate(zip(self._sheet.pictures, self._sheet.captions, strict=True)):
            cell = left + index % columns * self._pitch[0], top + index // columns * self._pitch[1]
            size = self._sizes[index]
            # Pictures of a row are aligned at the bottom.
            page.paste(_scaled(picture, size), (cell[0], cell[1] + self._cell[1] - size[1]))
            self._caption(draw, caption, (cell[0], cell[1] + self._cell[1] + BELOW_PICTURE))

    def _caption(self, draw: "ImageDraw", caption: tuple[str, str], corner: tuple[int, int]) -> None:
        left, top = corner
        for text, colour in zip(caption, (INK, PALE), strict=True):
            if text:
                draw.text((left, top), text, font=self._font, fill=colour)
                top += LINE


def _scale(longest: int) -> float:
    """Return the scale factor for pictures whose longest side is `longest`."""
    return SMALL_CELL // longest if longest <= SMALL_CELL else min(LARGE_CELL / longest, 1.0)


def _scaled(picture: "Image", size: tuple[int, int]) -> "Image":
    from PIL.Image import Resampling  # noqa: PLC0415 - Pillow is loaded with the first picture

    # Integer factors repeat pixels, so that a small picture keeps its exact look.
    whole = size[0] % picture.width == 0 and size[1] % picture.height == 0
    return picture.convert("RGB").resize(size, Resampling.NEAREST if whole else Resampling.LANCZOS)


def _wrapped(text: str, width: int, font: Any, most: int) -> list[str]:
    """Return `text` in at most `most` lines of at most `width` pixels, with an ellipsis if it is longer."""
    lines: list[str] = []
    words = _legible(text[:MOST_CHARACTERS]).split()
    for piece, whole in (piece for word in words for piece in _pieces(word, width, font)):
        extended = f"{lines[-1]} {piece}" if lines else piece
        if lines and whole and font.getlength(extended) <= width:
            lines[-1] = extended
        else:
            lines.append(piece)
        if len(lines) > most:
            break
    if len(lines) <= most and len(text) <= MOST_CHARACTERS:
        return lines
    lines = lines[:most]
    while lines[-1] and font.getlength(lines[-1] + ELLIPSIS) > width:
        lines[-1] = lines[-1][:-1]
    lines[-1] = lines[-1].rstrip(" ,;") + ELLIPSIS
    return lines


def _legible(text: str) -> str:
    """Return `text` in the few characters that Pillow's own font has: letters lose their accents."""
    plain = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if c.isascii() or c in FURTHER_CHARACTERS else "?" for c in plain)


def _pieces(word: str, width: int, font: Any) -> Iterator[tuple[str, bool]]:
    """Yield (piece, whether it is the whole word) for a word, cut into pieces if it is wider than a line."""
    start = 0
    while start < len(word):
        end = min(len(word), start + width // NARROWEST_LETTER)
        while end > start + 1 and font.getlength(word[start:end]) > width:
            # An estimate, so that few measurements are needed; at the end one character at a time.
            end -= max(1, int((end - start) * (1 - width / font.getlength(word[start:end]))))
        yield word[start:end], end - start == len(word)
        start = end
