"""What the refiner does to a LoRA: `python -m sdxl_trt.benchmarks.model_card.stickers`.

Draws with the embedded bundle and its LoRA, which gives every shape a white border, and measures the borders.
"""

__all__ = ["main"]

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from sdxl_trt.benchmarks.model_card.cases import CardCase, DrawSettings, evaluation_cases
from sdxl_trt.mini import lora_path
from sdxl_trt.mini.score import border_width
from sdxl_trt.runtime import Pipeline, Request, open_bundle
from sdxl_trt.runtime.adapters import LoraUse
from sdxl_trt.runtime.images import Sheet, draw_sheet

SCALES = (0.0, 0.5, 1.0)
HANDOFFS = {"base alone": None, "refiner from 0.9": 0.9, "refiner from 0.8": 0.8}
SHOWN = {
    "without the LoRA": (0.0, None),
    "scale 0.5": (0.5, None),
    "scale 1": (1.0, None),
    "scale 1, refiner from 0.9": (1.0, 0.9),
    "scale 1, refiner from 0.8": (1.0, 0.8),
}
"""The contact sheet's columns: scales and handoffs."""
SHEET_ROWS = 5


def draw(pipeline: Pipeline, cases: Sequence[CardCase], scale: float, handoff: float | None) -> npt.NDArray[np.uint8]:
    """Return pictures `(n, 128, 128, 3)` uint8; with `handoff` None the base draws alone."""
    settings = DrawSettings()
    loras = (LoraUse(str(lora_path()), scale),) if scale else ()
    pictures = []
    for case in cases:
        request = Request(
            case.caption,
            seed=case.seed,
            steps=settings.steps,
            handoff=handoff,
            guidance=settings.guidance,
            aesthetic_score=settings.aesthetic,
            negative_aesthetic_score=settings.negative_aesthetic,
            loras=loras,
        )
        pictures += [np.asarray(picture.image) for picture in pipeline.generate(request)]
    return np.stack(pictures)


def sticker_cases(count: int) -> list[CardCase]:
    """Return the first evaluation captions without white, beside which a white border is invisible."""
    return [case for case in evaluation_cases(4 * count) if "white" not in case.caption][:count]


def markdown(widths: Mapping[tuple[float, float | None], float]) -> str:
    """Return the mean widths by (scale, handoff) as a table: handoffs down, scales across."""
    lines = [
        "| drawn by | " + " | ".join(f"scale {scale:g}" for scale in SCALES) + " |",
        "|---" * (1 + len(SCALES)) + "|",
    ]
    for name, handoff in HANDOFFS.items():
        lines.append(f"| {name} | " + " | ".join(f"{widths[scale, handoff]:.1f}" for scale in SCALES) + " |")
    return "\n".join(lines)


def sticker_sheet(columns: Sequence[npt.NDArray[np.uint8]], cases: Sequence[CardCase]) -> Image.Image:
    """Return the contact sheet: a caption a row, a setting a column."""
    rows = len(columns[0])
    pictures = [Image.fromarray(column[row]) for row in range(rows) for column in columns]
    return draw_sheet(
        Sheet(
            pictures,
            [("", "")] * len(pictures),
            len(columns),
            heading="A LoRA that gives every shape a white border, and what the refiner does to it",
            rows=[case.caption for case in cases[:rows]],
            across=list(SHOWN),
        )
    )


def main(arguments: list[str] | None = None) -> None:
    """Draw, print the table, and write the contact sheet where asked."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_trt.benchmarks.model_card.stickers", description=__doc__)
    parser.add_argument("--count", type=int, default=24, help="captions")
    parser.add_argument("--sheet", type=Path, help="PNG file to write the first captions' pictures to")
    options = parser.parse_args(arguments)
    cases, widths, shown = sticker_cases(options.count), {}, {}
    with open_bundle(residency="resident") as pipeline:
        for handoff in HANDOFFS.values():
            for scale in SCALES:
                pictures = draw(pipeline, cases, scale, handoff)
                each = [border_width(one, case.caption) for one, case in zip(pictures, cases, strict=True)]
                widths[scale, handoff] = float(np.mean(each))
                shown[scale, handoff] = pictures[:SHEET_ROWS]
    print(markdown(widths))
    if options.sheet:
        sticker_sheet([shown[each] for each in SHOWN.values()], cases).save(options.sheet, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
