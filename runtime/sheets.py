"""Contact sheets: pictures on a calm ground, each with its caption."""

__all__ = ["contact_sheet"]

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

GAP, MARGIN, LINE = 14, 24, 17
GROUND, INK = (250, 250, 248), (60, 60, 64)
FONT_SIZE = 13
MAX_LINES = 2


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
