"""The tiny decoder beside the full one: `python -m sdxl_trt.benchmarks.model_card.tiny`.

Each caption is drawn once, and both decoders make its picture of the same latents, in turns. The full one's picture
must be the one that was drawn. Times are process time on one thread: of a decoder, and of the whole draw.
"""

__all__ = ["main"]

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from sdxl_trt.benchmarks.model_card.caching import one_thread
from sdxl_trt.benchmarks.model_card.cases import CardCase, evaluation_cases
from sdxl_trt.benchmarks.model_card.effects import Pixels, paired_effect, psnr, quality, share_right
from sdxl_trt.mini.score import Score, score_picture
from sdxl_trt.runtime import Pipeline, Request, open_bundle
from sdxl_trt.runtime.vae import decode_latents, to_uint8

MEASURES = ("sharpness", "damage", "colour_error")
REPEATS = 3


@dataclass
class Decoded:
    """The pictures of a decoder, their scores, and the seconds of each decode."""

    pixels: list[Pixels] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def draw(pipeline: Pipeline, case: CardCase, decoders: Mapping[str, Decoded]) -> float:
    """Draw a case, have all decoders decode its latents; return the seconds of the draw, with the full decoder."""
    begun = time.process_time()
    request = Request(case.caption, seed=case.seed, steps=30, handoff=0.8)
    (picture,) = pipeline.generate(request)
    seconds = time.process_time() - begun
    assert pipeline.run is not None  # noqa: S101 - it has run
    full = pipeline.vae(pipeline.run.request)
    vaes = {"full": full, "tiny": full.with_tiny_decoder()}
    taken: dict[str, list[float]] = {name: [] for name in vaes}
    for _ in range(REPEATS):
        for name, vae in vaes.items():
            (engine,) = pipeline.pool.phase(vae.decoder)
            begun = time.process_time()
            sample = decode_latents(engine, vae, pipeline.run.final)
            taken[name].append(time.process_time() - begun)
            if len(taken[name]) == 1:
                decoders[name].pixels.append(to_uint8(sample)[0])
    for name, found in decoders.items():
        found.seconds.append(min(taken[name]))
        found.scores.append(score_picture(found.pixels[-1], case.caption))
    if not np.array_equal(decoders["full"].pixels[-1], np.asarray(picture.image)):
        raise RuntimeError(f"{case.caption}: the decoded latents are not the picture that was drawn")
    return seconds


def compare(full: Decoded, tiny: Decoded, draws: list[float]) -> dict[str, Any]:
    """Return the figures of both decoders and the paired differences; `draws` are the seconds of whole draws."""
    distances = [psnr(one, other) for one, other in zip(full.pixels, tiny.pixels, strict=True)]
    whole, of_full, of_tiny = (np.array(one) for one in (draws, full.seconds, tiny.seconds))
    return {
        "count": len(distances),
        "psnr": {"median": float(np.median(distances)), "worst": float(np.min(distances))},
        "decoders": {name: {**share_right(one.scores), **quality(one.scores)}
                     for name, one in (("full", full), ("tiny", tiny))},
        "effects": {name: paired_effect(full.scores, tiny.scores, name) for name in MEASURES},
        "seconds": {"full": float(np.median(of_full)), "tiny": float(np.median(of_tiny))},
        "ratio": float(np.median(of_tiny / of_full)),
        "share": {"full": float(np.median(of_full / whole)),
                  "tiny": float(np.median(of_tiny / (whole - of_full + of_tiny)))},
    }  # fmt: skip


def markdown(result: Mapping[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = [
        f"{result['count']} captions, 30 steps, handoff 0.8. PSNR of the tiny decoder's pictures to the full one's:",
        f"median {result['psnr']['median']:.1f} dB, worst {result['psnr']['worst']:.1f} dB.",
        "",
        "| decoder | right % (95 % interval) | sharpness | damage | colour error | CPU time | share of a draw |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["decoders"].items():
        lines.append(f"| {name} | {row['right']:.1f} ({row['low']:.1f}–{row['high']:.1f}) | {row['sharpness']:.3f} |"
                     f" {row['damage']:.3f} | {row['colour_error']:.2f} | {1000 * result['seconds'][name]:.1f} ms |"
                     f" {100 * result['share'][name]:.1f} % |")  # fmt: skip
    lines += ["", "| tiny minus full | mean | 95 % interval |", "|---|---:|---|"]
    for name, row in result["effects"].items():
        lines.append(f"| {name.replace('_', ' ')} | {row['mean']:+.4f} | {row['low']:+.4f} to {row['high']:+.4f} |")
    lines += ["", f"Time of a decode, tiny / full: {result['ratio']:.2f}."]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Draw and decode all captions, print the tables and write the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_trt.benchmarks.model_card.tiny", description=__doc__)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--bundle", type=Path, help="draw with this bundle (default: the embedded one)")
    parser.add_argument("--output", type=Path, help="JSON file that receives the figures")
    options = parser.parse_args(arguments)
    full, tiny = Decoded(), Decoded()
    with (
        mock.patch("onnxruntime.SessionOptions", one_thread()),
        open_bundle(options.bundle, residency="resident", provider="ort-cpu") as pipeline,
    ):
        draws = [draw(pipeline, case, {"full": full, "tiny": tiny}) for case in evaluation_cases(options.count)]
    result = compare(full, tiny, draws)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")
    print(markdown(result))


if __name__ == "__main__":
    main()
