"""Whole pictures of a model of SDXL's graph: ours, with the presets, beside other libraries at their best.

The embedded pair, which the settings are compared on, draws a picture in a fraction of a second, most of it overhead;
a cousin of 50 million parameters at 512 pixels has SDXL's proportions. Its weights are random: what the pictures look
like says nothing, how long they take does.
"""

__all__ = ["AGAINST", "STEM", "draw_pictures"]

from dataclasses import replace
from pathlib import Path

import msgspec

from sdxl_trt.benchmarks.contest import BenchOptions, bench_bars, run_bench
from sdxl_trt.benchmarks.full_size import checkpoint_pair
from sdxl_trt.benchmarks.measure import Say, find_subject
from sdxl_trt.benchmarks.report import BenchReport, require_matplotlib, write_pages

STEM = "bench_pictures"
AGAINST = (
    "sdxl-trt-openvino",
    "sdxl-trt-fast",
    "sdxl-trt-fastest",
    "sdxl-trt-fastest-openvino",
    "compile-bf16",
    "diffusers",
    "optimum",
    "openvino-bf16",
)
"""The contestants beside ours; all are in memory at once."""
_WHOLE = BenchOptions(against=",".join(AGAINST), steps=30, runs=3, floors=False)
_COUSIN = ("cousin-50m", replace(_WHOLE, width=512, height=512))
_TINY = ("tiny", replace(_WHOLE, width=128, height=128, steps=6, runs=1))


def draw_pictures(work: Path, folder: Path, command: tuple[str, ...], say: Say, *, quick: bool) -> BenchReport:
    """Have all contestants draw in turns, write ``bench_pictures.json``, .md and .html to `folder`, and return them.

    Checkpoints and exports are kept in `work`. `quick` takes a tiny model and few steps: its times mean nothing.
    Raises EngineError if ours does not run, and whatever writing and exporting the checkpoints raise; the report says
    why another contestant did not run.
    """
    require_matplotlib()
    size, options = _TINY if quick else _COUSIN
    base, refiner = checkpoint_pair(work / "checkpoints" / size, size, say)
    subject = find_subject(None, str(base), str(refiner), work, say)
    report = run_bench(replace(subject, name="exported from it in fp32", model=size), options, say)
    about = f"the model is {size}, random weights in SDXL's architecture: its pictures are noise, its time is not"
    report = msgspec.structs.replace(report, command=command, notes=(about, *report.notes))
    report = msgspec.structs.replace(report, bars=bench_bars(report))
    write_pages(report, folder, STEM)
    return report
