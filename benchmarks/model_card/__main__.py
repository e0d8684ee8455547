"""Evaluate the embedded pair on captions and seeds unseen in training: `python -m sdxl_trt.benchmarks.model_card`."""

__all__ = ["main"]

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_trt.benchmarks.model_card.cases import CardCase, DrawSettings, Generator, evaluation_cases
from sdxl_trt.mini import materialize
from sdxl_trt.mini.score import Score, score_picture

BATCH = 25
HANDOFFS = (0.25, 0.5, 0.6, 0.7, 0.8, None)
AESTHETICS = (2.0, 4.0, 6.0, 8.0)

Row = dict[str, Any]


def scores(generator: Generator, wanted: list[CardCase], settings: DrawSettings) -> list[Score]:
    """Draw and score all cases, in batches."""
    scored: list[Score] = []
    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        pictures = generator([case.caption for case in part], [case.seed for case in part], settings)
        scored += [score_picture(picture, case.caption) for picture, case in zip(pictures, part, strict=True)]
    return scored


def share_right(scored: Iterable[Score]) -> Row:
    """Return the percentage right, overall with its 95 % Wilson interval and for each part of a caption."""
    all_scored = list(scored)
    count, right = len(all_scored), sum(one.right for one in all_scored)
    low, high = wilson(right, count)
    parts = ("shape", "colour", "background", "size", "position")
    each = {part: 100 * float(np.mean([getattr(one, part) for one in all_scored])) for part in parts}
    return {"count": count, "right": 100 * right / count, "low": 100 * low, "high": 100 * high, **each}


def quality(scored: Iterable[Score]) -> Row:
    """Return the means of the three quality measures over the pictures."""
    all_scored = list(scored)
    names = ("sharpness", "colour_error", "damage")
    return {name: float(np.mean([getattr(one, name) for one in all_scored])) for name in names}


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927)."""
    z = 1.96
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return float(centre - half), float(centre + half)


def paired_effect(before: list[Score], after: list[Score], name: str) -> Row:
    """Return a measure's mean change from before to after, on the same seeds: 95 % bootstrap interval, Cohen's d."""
    difference = np.array([getattr(b, name) - getattr(a, name) for a, b in zip(before, after, strict=True)])
    rng = np.random.default_rng(0)
    means = rng.choice(difference, (4000, len(difference))).mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    spread = float(difference.std(ddof=1))
    mean = float(difference.mean())
    return {"mean": mean, "low": float(low), "high": float(high), "d": mean / spread if spread else 0.0}


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
