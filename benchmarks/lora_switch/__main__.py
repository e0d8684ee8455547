"""Measure switching a LoRA on ONNX Runtime's CPU provider: ``make bench-lora``.

A UNet of random fp16 weights is exported once, and a LoRA of rank 16 of all its linear layers is written. Three
processes are measured: the UNet loaded alone, loaded with the LoRA, and one that runs steps without it, with it, and
without it again. Writes JSON and a Markdown table beside it. SDXL's size needs 24 GB of memory and 15 GB of disk;
``--size cousin-390m`` needs 5 GB and 2 GB.
"""

__all__ = ["Report", "bars", "main", "table"]

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sdxl_trt.benchmarks.lora_switch.child import UNET, Found
from sdxl_trt.benchmarks.measure import (
    RESULTS_FOLDER,
    Bar,
    Measured,
    at_most,
    bars_table,
    load_average,
    machine,
    machine_words,
    measure,
    missed,
    package_versions,
    results_parser,
    write_results,
)
from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.engines.adapters import ScaledLora, open_lora
from sdxl_trt.engines.backends.mapped import plan_patch
from sdxl_trt.engines.bundle import Bundle, read_bundle, read_table

COMMAND = "python -m sdxl_trt.benchmarks.lora_switch"
RESULTS = RESULTS_FOLDER / "lora_switch.json"
CASES = ("plain", "lora", "switch")
WORDS = {"plain": "the UNet alone", "lora": "with the LoRA", "switch": "without, with, and without it again"}
RANK = 16
STEPS, SIDE = 5, 64
SLOWEST_STEP = 1.05
PACKAGES = ("sdxl-trt", "onnxruntime", "numpy", "safetensors")


class Report(msgspec.Struct, frozen=True):
    """Everything that one run measured; `touched` are the bytes of the weights that the LoRA changes."""

    machine: dict[str, str | int]
    versions: dict[str, str]
    size: str
    side: int
    rank: int
    layers: int
    weights: int
    touched: int
    load: tuple[float, float]
    runs: dict[str, Measured]
    found: dict[str, Found]
    bars: list[Bar]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the results, and return the exit code: 1 if a bar is missed."""
    parser = results_parser(
        "sdxl_trt.benchmarks.lora_switch", __doc__, work=Path("out/bench-lora"), results=RESULTS, case="process"
    )
    parser.add_argument("--size", default="sdxl", help="the published size (default) or a cousin, such as cousin-390m")
    given = parser.parse_args(argv)
    size, side, steps = ("tiny", 16, 1) if given.quick else (given.size, SIDE, STEPS)
    try:
        bundle, lora, layers = prepare(given.work, size)
        before = load_average()
        chosen = [case for case in CASES if case in (given.only or CASES)]
        runs = {case: measure(_command(case, bundle, lora, side, steps)) for case in chosen}
    except SdxlTrtError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return exc.exit_code
    found = {case: msgspec.json.decode(run.output.splitlines()[-1], type=Found) for case, run in runs.items() if run.ok}
    for case, run in runs.items():
        if not run.ok:
            sys.stderr.write(f"{case}: exit code {run.exit_code}: {run.output}\n")
    touched = plan_patch(bundle, UNET, [ScaledLora(open_lora(lora), 1.0)]).nbytes
    report = Report(
        machine(), package_versions(PACKAGES), size, side, RANK, layers,
        bundle.manifest.components[UNET].weights.size, touched, (before, load_average()),
        {case: _without_paths(case, run) for case, run in runs.items()}, found, bars(runs, found, touched),
    )  # fmt: skip
    write_results(report, table(report), given.results)
    sys.stdout.write(table(report))
    return int(missed(report.bars) or any(not run.ok for run in runs.values()))


def prepare(work: Path, size: str) -> tuple[Bundle, Path, int]:
    """Return the exported UNet, the LoRA's file and its number of layers; what exists in `work` is used again."""
    from sdxl_trt.benchmarks.full_size import write_checkpoint  # noqa: PLC0415 - torch, in the first run only

    folder = work / size
    bundle = folder / "bundle"
    if not (bundle / "manifest.json").exists():
        from sdxl_trt.export import Options, export_bundle  # noqa: PLC0415

        base = folder / "base"
        if not base.exists():
            write_checkpoint(size, "base", folder)
        export_bundle(base, None, bundle, Options(components=frozenset({UNET})))
    opened = read_bundle(bundle, partial=True)
    lora = folder / f"rank{RANK}.safetensors"
    tensors = _lora(opened)
    if not lora.exists():
        from safetensors.numpy import save_file  # noqa: PLC0415

        save_file(tensors, lora)
    return opened, lora, len(tensors) // 2


def _lora(bundle: Bundle) -> dict[str, np.ndarray[Any, Any]]:
    """Return a LoRA of random fp16 numbers for every linear layer of the transformers, as kohya's scripts name them."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in read_table(bundle, UNET).shapes.items():
        if len(shape) == 2 and ".attentions." in name:
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            down, up = rng.standard_normal((RANK, shape[1])), rng.standard_normal((shape[0], RANK))
            tensors[f"{key}.lora_down.weight"] = (down * 0.02).astype(np.float16)
            tensors[f"{key}.lora_up.weight"] = (up * 0.02).astype(np.float16)
    return tensors


def _command(case: str, bundle: Bundle, lora: Path, side: int, steps: int) -> list[str]:
    module = ["-m", "sdxl_trt.benchmarks.lora_switch.child", case, str(bundle.root), str(lora)]
    return [sys.executable, *module, "--side", str(side), "--steps", str(steps)]


def _without_paths(case: str, run: Measured) -> Measured:
    """Leave this machine's paths out of the report."""
    command = ("python", "-m", "sdxl_trt.benchmarks.lora_switch.child", case)
    return msgspec.structs.replace(run, command=command, output="")


def bars(runs: Mapping[str, Measured], found: Mapping[str, Found], touched: int) -> list[Bar]:
    """Return the bars: a step's ratio, the memory of a load beside the touched bytes, and what is left afterwards."""
    switch = found.get("switch")
    ratio = None if switch is None else _ratio(switch)
    extra = None
    if "plain" in found and "lora" in found:
        extra = float(runs["lora"].peak_anonymous - runs["plain"].peak_anonymous)
    memory = touched + (1 << 30)
    return [
        at_most("a step with the LoRA, times one without", ratio, SLOWEST_STEP, f"{SLOWEST_STEP}", "{:.3f}".format),
        at_most("peak memory of a load with it, beyond that of one without", extra, memory,
                f"{memory / 1e9:.2f} GB (changed bytes + 1 GiB)", lambda size: f"{size / 1e9:.2f} GB"),
        Bar("the result after taking it off", "bit-identical", _told(switch), None if switch is None else switch.equal),
    ]  # fmt: skip


def _told(switch: Found | None) -> str:
    return "not measured" if switch is None else "bit-identical" if switch.equal else "differs"


def _ratio(switch: Found) -> float:
    """Return a step's time with the LoRA over the mean of the times before and after it, medians each."""
    before, during, after = (statistics.median(each) for each in switch.steps)
    return during / ((before + after) / 2)


def table(report: Report) -> str:
    """Return the report as Markdown."""
    load = f"{report.load[0]:.1f} at the beginning, {report.load[1]:.1f} at the end"
    about = (
        f"A UNet of {report.weights / 1e9:.2f} GB in fp16; a LoRA of rank {report.rank} of {report.layers} linear"
        f" layers, which changes {report.touched / 1e9:.2f} GB; one row of {report.side}² latents."
    )
    lines = [
        "# Switching a LoRA on ONNX Runtime's CPU provider",
        "",
        f"`{COMMAND}`, size {report.size}; {machine_words(report.machine)}. Load average {load}.",
        "",
        about,
        "",
        *bars_table(report.bars),
        "",
        "| process | loads | a step after each | peak anonymous memory | peak RSS |",
        "|---|---|---|---:|---:|",
        *(_line(case, run, report.found.get(case)) for case, run in report.runs.items()),
    ]
    return "\n".join(lines) + "\n"


def _line(case: str, run: Measured, found: Found | None) -> str:
    if found is None:
        return f"| {WORDS[case]} | failed, exit code {run.exit_code} | | | |"
    loads = ", ".join(f"{seconds:.1f} s" for seconds in found.loads)
    steps = ", ".join(f"{statistics.median(laps):.2f} s" for laps in found.steps)
    return f"| {WORDS[case]} | {loads} | {steps} | {run.peak_anonymous / 1e9:.2f} GB | {run.peak_rss / 1e9:.2f} GB |"


if __name__ == "__main__":
    raise SystemExit(main())
