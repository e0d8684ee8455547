"""Contact sheets: pictures on a calm ground, each with its caption."""

__all__ = ["Sheet", "contact_sheet", "draw_sheet"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

GAP, MARGIN, LINE = 14, 24, 17
GROUND, INK, PALE, RULE = (250, 250, 248), (60, 60, 64), (128, 128, 132), (222, 222, 218)
FONT_SIZE = 13
MAX_LINES = 2
SMALL, LARGE = 256, 384
"""Cells of a sheet in pixels: small pictures are enlarged by whole pixels, large ones reduced."""
HEADING_SIZE, LARGE_LINE = 18, 24
WIDEST_TITLE = 150


def contact_sheet(pictures: "Sequence[Image]", captions: Sequence[str], columns: int, cell: int = 192) -> "Image":
    """Return one image with `pictures` in rows of `columns`, each drawn `cell` pixels wide over its caption.

    Captions wrap to two lines and end in an ellipsis where they are longer. Pictures may differ in size.
    """
    from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415 - Pillow is loaded with the first picture

    font = ImageFont.load_default(FONT_SIZE)
    heights = [round(cell * picture.height / picture.width) for picture in pictures]
    row_height = max(heights) + MAX_LINES * LINE + GAP
    rows = -(-len(pictures) // columns)
    size = (2 * MARGIN + columns * (cell + GAP) - GAP, 2 * MARGIN + rows * row_height - GAP)
    sheet = Image.new("RGB", size, GROUND)
    draw = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = MARGIN + index % columns * (cell + GAP), MARGIN + index // columns * row_height
        # Enlarged by whole pixels where it fits, so that a small picture is seen as it is.
        way = Image.Resampling.NEAREST if cell % picture.width == 0 else Image.Resampling.LANCZOS
        sheet.paste(picture.convert("RGB").resize((cell, heights[index]), way), (left, top))
        for number, line in enumerate(_wrapped(caption, cell, font)):
            draw.text((left, top + heights[index] + 4 + number * LINE), line, font=font, fill=INK)
    return sheet


@dataclass(frozen=True)
class Sheet:
    """Pictures of one size, row by row, to be compared: what all have in common on top, what differs beside each.

    A caption is a bold and a pale line; titles of `rows` and `across` of the columns make it a grid.
    """

    pictures: "Sequence[Image]"
    captions: Sequence[tuple[str, str]]
    columns: int
    heading: str = ""
    notes: str = ""
    rows: Sequence[str] = ()
    across: Sequence[str] = ()


def draw_sheet(sheet: Sheet) -> "Image":
    """Return the sheet as one image."""
    from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415 - Pillow is loaded with the first picture

    usual, large = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(HEADING_SIZE)
    width, height = _cell(*sheet.pictures[0].size)
    lines = max(sum(map(bool, caption)) for caption in sheet.captions)
    texts = (*sheet.across, *(line for caption in sheet.captions for line in caption))
    pitch = (max(width, *(round(usual.getlength(text)) for text in texts)) + GAP, height + lines * LINE + GAP + 6)
    left = MARGIN + (
        min(max(round(usual.getlength(row)) for row in sheet.rows), WIDEST_TITLE) + GAP if sheet.rows else 0
    )
    inner = max(left + sheet.columns * pitch[0] - GAP, 2 * SMALL) - MARGIN
    heading = _wrapped(sheet.heading, inner, large)
    top = MARGIN + len(heading) * LARGE_LINE + LINE + GAP + (LINE + 6 if sheet.across else 0)
    count = -(-len(sheet.pictures) // sheet.columns)
    page = Image.new("RGB", (inner + 2 * MARGIN, top + count * pitch[1] - GAP + MARGIN), GROUND)
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(heading):
        draw.text((MARGIN, MARGIN + number * LARGE_LINE - 4), line, font=large, fill=INK)
    draw.text((MARGIN, MARGIN + len(heading) * LARGE_LINE), sheet.notes, font=usual, fill=PALE)
    for column, title in enumerate(sheet.across):
        draw.text((left + column * pitch[0], top - LINE - 6), title, font=usual, fill=INK)
    for row, title in enumerate(sheet.rows):
        for number, line in enumerate(_wrapped(title, WIDEST_TITLE, usual)):
            draw.text((MARGIN, top + row * pitch[1] + number * LINE), line, font=usual, fill=INK)
    for index, (picture, caption) in enumerate(zip(sheet.pictures, sheet.captions, strict=True)):
        corner = (left + index % sheet.columns * pitch[0], top + index // sheet.columns * pitch[1])
        page.paste(_scaled(picture, (width, height)), corner)
        _caption(draw, caption, (corner[0], corner[1] + height + 5), usual)
    return page


def _caption(draw: "ImageDraw", caption: tuple[str, str], corner: tuple[int, int], font: Any) -> None:
    left, top = corner
    for text, colour in zip(caption, (INK, PALE), strict=True):
        if text:
            draw.text((left, top), text, font=font, fill=colour)
            top += LINE


def _cell(width: int, height: int) -> tuple[int, int]:
    """Return the size at which a picture is shown."""
    longest = max(width, height)
    scale: float = SMALL // longest if longest <= SMALL else min(LARGE / longest, 1.0)
    return round(width * scale), round(height * scale)


def _scaled(picture: "Image", size: tuple[int, int]) -> "Image":
    from PIL.Image import Resampling  # noqa: PLC0415 - Pillow is loaded with the first picture

    # Enlarged by whole pixels, so that a small picture is seen as it is.
    whole = size[0] % picture.width == 0 and size[1] % picture.height == 0
    return picture.convert("RGB").resize(size, Resampling.NEAREST if whole else Resampling.LANCZOS)


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        extended = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(extended) <= width:
            lines[-1] = extended
        else:
            lines.append(word)
    if len(lines) > MAX_LINES:
        lines = lines[:MAX_LINES]
        lines[-1] = lines[-1].rsplit(" ", 1)[0] + " …"
    return lines
