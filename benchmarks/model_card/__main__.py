"""Evaluate the embedded pair on captions and seeds unseen in training: `python -m sdxl_trt.benchmarks.model_card`."""

__all__ = ["main"]

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from sdxl_trt.benchmarks.model_card.cases import CardCase, DrawSettings, Generator, evaluation_cases
from sdxl_trt.benchmarks.model_card.effects import Row, paired_effect, quality, share_right
from sdxl_trt.mini import materialize
from sdxl_trt.mini.score import Score, score_picture

BATCH = 25
HANDOFFS = (0.25, 0.5, 0.6, 0.7, 0.8, None)
AESTHETICS = (2.0, 4.0, 6.0, 8.0)


def scores(generator: Generator, wanted: list[CardCase], settings: DrawSettings) -> list[Score]:
    """Draw and score all cases, in batches."""
    scored: list[Score] = []
    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        pictures = generator([case.caption for case in part], [case.seed for case in part], settings)
        scored += [score_picture(picture, case.caption) for picture, case in zip(pictures, part, strict=True)]
    return scored


def evaluate(generator: Generator, count: int, sweep_count: int, settings: DrawSettings) -> Row:
    """Return all figures. Every setting draws the same captions from the same noise; sweeps use the first few."""
    usual = evaluation_cases(count)
    default = scores(generator, usual, settings)
    alone = scores(generator, usual, replace(settings, handoff=None))
    few = usual[:sweep_count]

    def swept(changed: DrawSettings) -> list[Score]:
        known = {settings: default, replace(settings, handoff=None): alone}
        return known[changed][:sweep_count] if changed in known else scores(generator, few, changed)

    by_handoff = {handoff: swept(replace(settings, handoff=handoff)) for handoff in HANDOFFS}
    by_score = {value: swept(replace(settings, aesthetic=value)) for value in AESTHETICS}
    measures = ("sharpness", "colour_error", "damage")
    return {
        "settings": asdict(settings),
        "defaults": {**share_right(default), **quality(default)},
        "held_out": share_right(scores(generator, evaluation_cases(count, held_out=True), settings)),
        "base_alone": {**share_right(alone), **quality(alone)},
        "refiner_effect": {name: paired_effect(alone, default, name) for name in measures},
        "sweep_count": sweep_count,
        "handoff": [
            {"handoff": handoff, "right": share_right(found)["right"], **quality(found)}
            for handoff, found in by_handoff.items()
        ],
        "aesthetic": [{"aesthetic": value, **quality(found)} for value, found in by_score.items()],
    }


def markdown(result: Row) -> str:
    """Return the result as Markdown tables."""
    lines = [
        "| captions | n | right % (95 % interval) | shape | colour | background | size | position |",
        "|---" * 8 + "|",
    ]
    for name in ("defaults", "held_out", "base_alone"):
        row = result[name]
        parts = " | ".join(f"{row[part]:.1f}" for part in ("shape", "colour", "background", "size", "position"))
        lines.append(f"| {name} | {row['count']} | {row['right']:.1f} ({row['low']:.1f}–{row['high']:.1f}) | {parts} |")
    lines += ["", "| pair less base alone | mean | 95 % interval | Cohen's d |", "|---" * 4 + "|"]
    for name, row in result["refiner_effect"].items():
        lines.append(f"| {name} | {row['mean']:+.4f} | {row['low']:+.4f} to {row['high']:+.4f} | {row['d']:+.2f} |")
    lines += ["", "| handoff | right % | sharpness | colour error | damage |", "|---" * 5 + "|"]
    for row in result["handoff"]:
        lines.append(f"| {row['handoff'] or 'none'} | {row['right']:.1f} | {_quality_cells(row)} |")
    lines += ["", "| aesthetic score | sharpness | colour error | damage |", "|---" * 4 + "|"]
    lines += [f"| {row['aesthetic']:g} | {_quality_cells(row)} |" for row in result["aesthetic"]]
    return "\n".join(lines)


def _quality_cells(row: Row) -> str:
    return f"{row['sharpness']:.3f} | {row['colour_error']:.2f} | {row['damage']:.3f}"


@contextmanager
def _generator(bundle: Path | None) -> Iterator[Generator]:
    """Yield a generator of pictures: an exported bundle, or by default diffusers on the materialized pair."""
    if bundle is not None:
        from sdxl_trt.benchmarks.model_card.draw_engines import engine_pair  # noqa: PLC0415 (it imports this module)

        with engine_pair(bundle) as generator:
            yield generator
        return
    from sdxl_trt.benchmarks.model_card.draw_torch import TorchPair  # noqa: PLC0415 (torch)

    with tempfile.TemporaryDirectory() as folder:
        yield TorchPair(*materialize(folder))


def main(arguments: list[str] | None = None) -> None:
    """Draw with the embedded pair or a bundle, print the tables and write them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_trt.benchmarks.model_card", description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--sweep", type=int, default=60, help="captions for each setting of the sweeps")
    parser.add_argument("--output", type=Path, help="JSON file to write the figures to")
    parser.add_argument("--bundle", type=Path, help="draw with this exported bundle instead of diffusers in fp32")
    options = parser.parse_args(arguments)
    with _generator(options.bundle) as generator:
        result = evaluate(generator, options.count, options.sweep, DrawSettings())
    print(markdown(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
