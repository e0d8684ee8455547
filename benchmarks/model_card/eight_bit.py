"""The embedded pair in 8 bits against fp16, picture by picture: `python -m sdxl_trt.benchmarks.model_card.eight_bit`.

Both draw the same captions from the same noise, so that a difference is the engines' alone. Which share of the
pictures is right, how sharp and how damaged they are, and how far the pixels differ, is stated with intervals of 95 %.
"""

__all__ = ["main"]

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sdxl_trt.benchmarks.model_card.cases import CardCase, DrawSettings, evaluation_cases
from sdxl_trt.benchmarks.model_card.draw_engines import engine_pair
from sdxl_trt.benchmarks.model_card.effects import paired_effect, psnr, quality, share_right
from sdxl_trt.export import Options, export_bundle
from sdxl_trt.mini.score import Score, score_picture

Pixels = npt.NDArray[np.uint8]
_COMMAND = "python -m sdxl_trt.benchmarks.model_card.eight_bit --output benchmarks/results/eight_bit.json"
_REFERENCE = "fp16"
_BATCH = 25
_MEASURES = ("sharpness", "damage", "colour_error")


@dataclass(frozen=True)
class Variant:
    """A bundle to draw with: its precision, and the components that are not fp16."""

    precision: Literal["fp16", "int8", "fp8"]
    components: frozenset[str] | None = None
    decoder: bool = False


VARIANTS: Mapping[str, Variant] = {
    "int8": Variant("int8"),
    "int8, base alone": Variant("int8", frozenset({"unet"})),
    "int8, refiner alone": Variant("int8", frozenset({"refiner_unet"})),
    "int8 and the decoder": Variant("int8", decoder=True),
    "fp8, simulated": Variant("fp8"),
}


@dataclass(frozen=True)
class Drawn:
    """Pictures and their scores."""

    pixels: Pixels
    scores: list[Score]


def draw(bundle: Path, cases: list[CardCase]) -> Drawn:
    """Draw and score all cases with a bundle."""
    pictures: list[Pixels] = []
    with engine_pair(bundle) as generator:
        for start in range(0, len(cases), _BATCH):
            part = cases[start : start + _BATCH]
            pictures.append(generator([case.caption for case in part], [case.seed for case in part], DrawSettings()))
    pixels = np.concatenate(pictures)
    return Drawn(pixels, [score_picture(one, case.caption) for one, case in zip(pixels, cases, strict=True)])


def compare(found: Drawn, reference: Drawn) -> dict[str, Any]:
    """Return the figures of a variant; differences are those to the reference, picture by picture."""
    decibels = [psnr(one, other) for one, other in zip(found.pixels, reference.pixels, strict=True)]
    return {
        **share_right(found.scores),
        **quality(found.scores),
        "difference": {name: paired_effect(reference.scores, found.scores, name) for name in ("right", *_MEASURES)},
        "psnr_median": float(np.median(decibels)),
        "psnr_worst": float(np.min(decibels)),
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    usual = result[_REFERENCE]
    lines = [
        f"{result['count']} captions, {DrawSettings().steps} steps; differences to {_REFERENCE} with 95 % intervals.",
        "",
        "| drawn in | right % | difference, points | sharpness | damage | PSNR median / worst, dB |",
        "|---|---:|---|---|---|---:|",
        f"| {_REFERENCE} | {usual['right']:.1f} | – | {usual['sharpness']:.3f} | {usual['damage']:.3f} | – |",
    ]
    for name, row in result["variants"].items():
        points = {end: 100 * row["difference"]["right"][end] for end in ("mean", "low", "high")}
        cells = [f"{points['mean']:+.2f} ({points['low']:+.2f} to {points['high']:+.2f})"]
        cells += [_cell(row["difference"][measure]) for measure in ("sharpness", "damage")]
        lines.append(f"| {name} | {row['right']:.1f} | {' | '.join(cells)} | {row['psnr_median']:.1f} /"
                     f" {row['psnr_worst']:.1f} |")  # fmt: skip
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Export the variants, draw with each, print the table and write the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_trt.benchmarks.model_card.eight_bit", description=__doc__)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--variant", action="append", choices=tuple(VARIANTS), help="draw this one; may be repeated"
                        " (default: all)")  # fmt: skip
    parser.add_argument("--output", type=Path, help="JSON file that receives the figures, beside those it has, and a"
                        " page beside it")  # fmt: skip
    options = parser.parse_args(arguments)
    cases = evaluation_cases(options.count)
    with tempfile.TemporaryDirectory() as folder:
        usual = Path(folder) / _REFERENCE
        export_bundle(out=usual)
        reference = draw(usual, cases)
        result: dict[str, Any] = {
            "count": options.count,
            _REFERENCE: {**share_right(reference.scores), **quality(reference.scores)},
            "variants": {},
        }
        for name in options.variant or VARIANTS:
            result["variants"][name] = compare(draw(_export(VARIANTS[name], usual, Path(folder)), cases), reference)
            print(name, json.dumps(result["variants"][name]), flush=True)
    if options.output:
        known = json.loads(options.output.read_text("utf-8")) if options.output.exists() else {}
        if known.get("count") == options.count:
            result["variants"] = {**known["variants"], **result["variants"]}
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")
        page = f"# The embedded pair in 8 bits\n\nWritten by `{_COMMAND}`.\n\n{markdown(result)}\n"
        options.output.with_suffix(".md").write_text(page, encoding="utf-8", newline="\n")
    print(markdown(result))


def _export(variant: Variant, usual: Path, folder: Path) -> Path:
    """Return the bundle of a variant; its fp16 components are those of the bundle `usual`."""
    target = folder / "variant"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(usual, target)
    options = Options(
        precision=variant.precision,
        vae_precision="int8" if variant.decoder else "auto",
        components=variant.components,
    )
    export_bundle(out=target, options=options)
    return target


def _cell(row: Mapping[str, float]) -> str:
    return f"{row['mean']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"


if __name__ == "__main__":
    main()
