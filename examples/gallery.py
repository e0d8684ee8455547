"""The README's contact sheet, drawn by the embedded bundle: `python examples/gallery.py out.png`."""

import sys
from pathlib import Path

from sdxl_trt import Request, open_bundle
from sdxl_trt.runtime import contact_sheet

PROMPTS = (
    "a large red star on a blue background",
    "a striped yellow circle on a green background",
    "a white triangle on a purple background",
    "a dotted blue square on a yellow background",
    "a green ring on a white background",
    "an orange cross on a black background",
    "a small purple star on an orange background",
    "a black ring on a red background",
)
COLUMNS, SEED, CELL = 4, 7, 256


def draw(path: Path) -> None:
    """Draw every prompt with the defaults and one seed, nothing chosen by hand, and write the sheet to `path`."""
    with open_bundle() as pipeline:
        pictures = [next(iter(pipeline.generate(Request(prompt, seed=SEED)))).image for prompt in PROMPTS]
    sheet = contact_sheet(pictures, PROMPTS, COLUMNS, CELL)
    sheet.save(path, format="PNG", optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1] if len(sys.argv) > 1 else "gallery.png"))
