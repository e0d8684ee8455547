"""What the refiner does to a LoRA: `python -m sdxl_trt.benchmarks.model_card.stickers`.

Draws stickers with the embedded pair and its own LoRAs, and measures the white border around every shape. Drawn with
diffusers, float32, on the CPU; diffusers' own loader reads the LoRA files.
"""

__all__ = ["main"]

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sdxl_trt.benchmarks.model_card.cases import CardCase, DrawSettings, evaluation_cases
from sdxl_trt.benchmarks.model_card.draw_torch import TorchPair
from sdxl_trt.mini import LORAS, lora_path, materialize
from sdxl_trt.mini.score import border_width, score_picture
from sdxl_trt.runtime.images import Sheet, draw_sheet

STICKER = "sticker"
SCALES = (0.0, 0.5, 1.0)
SHEET_ROWS = 5


@dataclass(frozen=True)
class Way:
    """One way to draw stickers: the refiner's handoff, or None for the base alone, and whether it has its own LoRA."""

    handoff: float | None
    own: bool = False

    def __str__(self) -> str:
        """Name the way, as the figures do."""
        if self.handoff is None:
            return "base alone"
        return f"refiner from {self.handoff:g}" + (", with its own LoRA" if self.own else "")


WAYS = (Way(None), Way(0.9), Way(0.8), Way(0.9, own=True), Way(0.8, own=True))
SHOWN = {
    "without the LoRA": (0.0, Way(None)),
    "scale 0.5, base alone": (0.5, Way(None)),
    "scale 1, base alone": (1.0, Way(None)),
    "scale 1, refiner from 0.9": (1.0, Way(0.9)),
    "scale 1, refiner from 0.8": (1.0, Way(0.8)),
    "the refiner with its LoRA": (1.0, Way(0.8, own=True)),
}
"""The contact sheet's columns."""


class StickerPair(TorchPair):
    """The embedded pair in diffusers, with its two LoRAs at scales that can be changed."""

    def __init__(self, base: Path, refiner: Path) -> None:
        """Load both pipelines and their LoRAs."""
        super().__init__(base, refiner)
        for stage, pipeline in (("base", self.base), ("refiner", self.refiner)):
            path = lora_path(LORAS[stage])
            pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=STICKER)

    def draw(self, cases: Sequence[CardCase], scale: float, way: Way) -> npt.NDArray[np.uint8]:
        """Return pictures `(n, 128, 128, 3)` uint8; the refiner's own LoRA has the base's scale."""
        self._kept.clear()
        self.base.set_adapters(STICKER, scale)
        self.refiner.set_adapters(STICKER, scale if way.own else 0.0)
        settings = replace(DrawSettings(), handoff=way.handoff)
        return self([case.caption for case in cases], [case.seed for case in cases], settings)


def sticker_cases(count: int) -> list[CardCase]:
    """Return the first evaluation captions without white, beside which a white border is invisible."""
    return [case for case in evaluation_cases(4 * count) if "white" not in case.caption][:count]


def measured(pictures: npt.NDArray[np.uint8], cases: Sequence[CardCase]) -> dict[str, float]:
    """Return the mean width of the borders in pixels, its standard deviation, and the percentage of right pictures."""
    widths = [border_width(one, case.caption) for one, case in zip(pictures, cases, strict=True)]
    right = [score_picture(one, case.caption).right for one, case in zip(pictures, cases, strict=True)]
    return {"border": float(np.mean(widths)), "deviation": float(np.std(widths)), "right": 100 * float(np.mean(right))}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the figures as a table: ways down, scales across."""
    lines = [
        "| drawn by | " + " | ".join(f"scale {scale:g}" for scale in SCALES) + " |",
        "|---" * (1 + len(SCALES)) + "|",
    ]
    for way in WAYS:
        cells = [row for row in rows if row["way"] == str(way)]
        lines.append(
            f"| {way} | " + " | ".join(f"{row['border']:.1f} px, {row['right']:.0f} %" for row in cells) + " |"
        )
    return "\n".join(lines)


def sticker_sheet(columns: Sequence[npt.NDArray[np.uint8]], cases: Sequence[CardCase]) -> Image.Image:
    """Return the contact sheet: a caption a row, a way to draw it a column."""
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
    """Draw, print the table, and write the figures and the contact sheet where asked."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_trt.benchmarks.model_card.stickers", description=__doc__)
    parser.add_argument("--count", type=int, default=24, help="captions")
    parser.add_argument("--sheet", type=Path, help="PNG file to write the first captions' pictures to")
    parser.add_argument("--output", type=Path, help="JSON file to write the figures to")
    options = parser.parse_args(arguments)
    cases, rows, shown = sticker_cases(options.count), [], {}
    with tempfile.TemporaryDirectory() as folder:
        pair = StickerPair(*materialize(folder))
        for way in WAYS:
            for scale in SCALES:
                pictures = pair.draw(cases, scale, way)
                rows.append({"way": str(way), **asdict(way), "scale": scale, **measured(pictures, cases)})
                shown[scale, way] = pictures[:SHEET_ROWS]
    print(markdown(rows))
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8", newline="\n")
    if options.sheet:
        sticker_sheet([shown[each] for each in SHOWN.values()], cases).save(options.sheet, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
