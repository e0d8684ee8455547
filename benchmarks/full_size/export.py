"""Measure the export at SDXL's real size, each exporter in its own process: ``make bench-export``.

Writes JSON (machine, versions, commands, figures) and a Markdown table beside it. Missing checkpoints, 13 GB and 4 GB
of random weights, are written to ``--work``; the exported folders need as much again.
"""

__all__ = ["Bar", "ExportCase", "Report", "bars", "cases", "main", "run", "table"]

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sdxl_trt.benchmarks.measure import (
    NOT_MEASURED,
    RESULTS_FOLDER,
    Bar,
    Measured,
    at_most,
    bars_table,
    machine,
    machine_words,
    measure,
    missed,
    package_versions,
    results_parser,
    write_results,
)

GB, MINUTE = 10**9, 60.0
PACKAGES = (
    "sdxl-trt", "torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "safetensors", "numpy",
    "tensorrt-cu12-bindings", "onnxruntime-ep-nv-tensorrt-rtx-cu12",
)  # fmt: skip
PEERS = Path(".venv-peers/bin/python")
RESULTS = RESULTS_FOLDER / "export.json"
_MODULE = "sdxl_trt.benchmarks.full_size."
# The checkpoints by role in the comparison, as (size, dtype); the second set is for --quick.
SCALES = {
    False: {"full": ("sdxl", "fp16"), "narrow": ("cousin-390m", "fp16"), "peer": ("cousin-1b", "fp32")},
    True: {"full": ("tiny", "fp32"), "narrow": ("tiny", "fp32"), "peer": ("tiny", "fp32")},
}


@dataclass(frozen=True)
class ExportCase:
    """One process to measure: its name, command and output folder; `missing` is why it cannot run, or ""."""

    name: str
    command: tuple[str, ...]
    out: Path | None = None
    missing: str = ""


class Report(msgspec.Struct, frozen=True):
    """Everything that one run measured."""

    machine: dict[str, str | int]
    versions: dict[str, str]
    quick: bool
    runs: dict[str, Measured]
    not_run: dict[str, str]
    bars: list[Bar]


def cases(work: Path, *, quick: bool) -> list[ExportCase]:
    """Return the processes to measure, in order; `quick` takes tiny models, to test the benchmark itself."""
    sources = {scale: _folder(work, *model) for scale, model in SCALES[quick].items()}
    peers = "" if PEERS.exists() else f"there is no {PEERS.parent.parent}; create it with: make peers"
    python, base = (sys.executable, "-m"), sources["peer"] / "base"

    def ours(name: str, scale: str, *arguments: str, precision: str = "--fp16") -> ExportCase:
        out, pair = work / "exported" / name.replace(" ", "-"), sources[scale]
        options = ("--base", str(pair / "base"), *arguments, precision, "--out", str(out))
        return ExportCase(name, (*python, f"{_MODULE}exporters", "ours", *options), out)

    def other(name: str, what: str, interpreter: str, missing: str = "") -> ExportCase:
        out = work / "exported" / name.replace(" ", "-")
        return ExportCase(name, (interpreter, "-m", f"{_MODULE}exporters", what, str(base), str(out)), out, missing)

    def imports(exporter: str, interpreter: str, missing: str = "") -> ExportCase:
        name = f"imports of {exporter}"
        return ExportCase(name, (interpreter, "-m", f"{_MODULE}exporters", "imports", exporter), None, missing)

    unet = ("--no-refiner", "--components", "unet")
    whole = ours("pair", "full", "--refiner", str(sources["full"] / "refiner"))
    return [
        imports("ours", sys.executable),
        ours("base UNet", "full", *unet),
        ours("narrow UNet", "narrow", *unet),
        whole,
        ExportCase("TensorRT parser", (*python, f"{_MODULE}parse", str(whole.out))),
        imports("torch", sys.executable),
        ours("1B UNet", "peer", *unet, precision="--fp32"),
        other("1B UNet by torch", "torch", sys.executable),
        imports("optimum", str(PEERS), peers),
        ours("1B base", "peer", "--no-refiner", precision="--fp32"),
        other("1B base by optimum", "optimum", str(PEERS), peers),
    ]


def run(chosen: Sequence[ExportCase], work: Path, *, quick: bool) -> Report:
    """Measure the `chosen` cases one after the other; a case's output is deleted once no later case needs it."""
    runs: dict[str, Measured] = {}
    not_run: dict[str, str] = {}
    for case in chosen:
        if case.missing:
            not_run[case.name] = case.missing
            continue
        if case.out:
            shutil.rmtree(case.out, ignore_errors=True)
        sys.stderr.write(f"{case.name}\n")
        measured = measure(list(case.command))
        # Leave this machine's paths out of the report.
        output = measured.output.rpartition("\n")[2] if measured.ok else measured.output.replace(f"{Path.cwd()}/", "")
        runs[case.name] = msgspec.structs.replace(measured, command=("python", *case.command[1:]), output=output)
        # Only the pair is kept: the parser reads it.
        if case.out and case.name != "pair":
            shutil.rmtree(case.out, ignore_errors=True)
    shutil.rmtree(work / "exported", ignore_errors=True)
    return Report(machine(), package_versions(PACKAGES), quick, runs, not_run, bars(runs))


def bars(runs: Mapping[str, Measured]) -> list[Bar]:
    """Return the bars with the measured figures; cases that failed or did not run count as not measured."""
    done = {name: measured for name, measured in runs.items() if measured.ok}
    return [
        _limit("base UNet, checkpoint to checked ONNX: peak RSS", done.get("base UNet"), "peak_rss", 1.2 * GB),
        _limit("base UNet, checkpoint to checked ONNX: time", done.get("base UNet"), "seconds", 100),
        _limit("all graphs of base and refiner: peak RSS", done.get("pair"), "peak_rss", 2 * GB),
        _limit("all graphs of base and refiner: time", done.get("pair"), "seconds", 10 * MINUTE),
        _ratio("peak RSS, a 6.6 times larger UNet of the same depth", done, ("base UNet", "narrow UNet"), 1.25),
        *_against("torch.onnx.export(dynamo=True)", done, ("1B UNet", "1B UNet by torch"), "torch"),
        *_against("optimum's exporter", done, ("1B base", "1B base by optimum"), "optimum"),
        Bar("every graph accepted by the TensorRT parser", "all", *_accepted(runs.get("TensorRT parser"))),
    ]


def _limit(what: str, measured: Measured | None, figure: str, limit: float) -> Bar:
    value = None if measured is None else float(getattr(measured, figure))
    if figure == "seconds":
        return at_most(what, value, limit, f"{limit:.0f} s", lambda seconds: f"{seconds:.0f} s")
    return at_most(what, value, limit, f"{limit / GB:.1f} GB", lambda size: f"{size / GB:.2f} GB")


def _ratio(what: str, done: Mapping[str, Measured], names: tuple[str, str], limit: float) -> Bar:
    there = all(name in done for name in names)
    value = done[names[0]].peak_rss / done[names[1]].peak_rss if there else None
    return at_most(what, value, limit, f"{limit} times", lambda times: f"{times:.2f} times")


def _against(peer: str, done: Mapping[str, Measured], names: tuple[str, str], imports: str) -> list[Bar]:
    """Return the bars for memory above each exporter's own imports, and for total time."""
    memory, pace = f"1 B fp32, RSS above the imports', against {peer}", f"1 B fp32, time, against {peer}"
    if any(name not in done for name in (*names, "imports of ours", f"imports of {imports}")):
        return [Bar(memory, "<= 0.25 times", NOT_MEASURED, None), Bar(pace, "<= 1 times", NOT_MEASURED, None)]
    ours, theirs = (done[name] for name in names)
    above = [ours.peak_rss - done["imports of ours"].peak_rss, theirs.peak_rss - done[f"imports of {imports}"].peak_rss]
    share, times = above[0] / max(1, above[1]), ours.seconds / theirs.seconds
    shown = f"{share:.2f} times ({above[0] / GB:.2f} of {above[1] / GB:.2f} GB)"
    taken = f"{times:.2f} times ({ours.seconds:.0f} of {theirs.seconds:.0f} s)"
    return [
        Bar(memory, "<= 0.25 times", shown, above[1] > 0 and share <= 0.25),
        Bar(pace, "<= 1 times", taken, times <= 1),
    ]


def _accepted(measured: Measured | None) -> tuple[str, bool | None]:
    if measured is None:
        return NOT_MEASURED, None
    return ("all" if measured.ok else "refused: see the run"), measured.ok


def table(report: Report) -> str:
    """Return the report as Markdown: the bars, then the runs with their commands."""
    size = "tiny models: these figures test the benchmark, not the export" if report.quick else "fp16 unless named"
    lines = [f"Export, {size}. {machine_words(report.machine)}.", "", *bars_table(report.bars)]
    lines += ["", "| run | seconds | peak RSS | anonymous | mapped files | command |", "|---|---|---|---|---|---|"]
    for name, one in report.runs.items():
        memory = " | ".join(f"{size / GB:.2f} GB" for size in (one.peak_rss, one.peak_anonymous, one.peak_file))
        ended = f"{one.seconds:.1f}" if one.ok else f"failed ({one.exit_code})"
        command = " ".join(one.command)
        lines.append(f"| {name} | {ended} | {memory} | `{command}` |")
    lines += [f"| {name} | not run | | | | {reason} |" for name, reason in report.not_run.items()]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the results and return 1 if a run failed or a bar was missed, else 0."""
    prog = f"{_MODULE}export"
    parser = results_parser(prog, __doc__, work=Path("out/bench-export"), results=RESULTS, case="run")
    arguments = parser.parse_args(argv)
    everything = cases(arguments.work, quick=arguments.quick)
    chosen = [case for case in everything if not arguments.only or case.name in arguments.only]
    _make_checkpoints(arguments.work, quick=arguments.quick)
    report = run(chosen, arguments.work, quick=arguments.quick)
    write_results(report, table(report), arguments.results)
    sys.stdout.write(table(report))
    failed = [name for name, measured in report.runs.items() if not measured.ok]
    for name in failed:
        sys.stderr.write(f"error: {name}: {report.runs[name].output}\n")
    return 1 if failed or (not arguments.quick and missed(report.bars)) else 0


def _folder(work: Path, size: str, dtype: str) -> Path:
    return work / "checkpoints" / f"{size}-{dtype}"


def _make_checkpoints(work: Path, *, quick: bool) -> None:
    """Write missing checkpoints in subprocesses, so that this process stays small."""
    for scale, (size, dtype) in SCALES[quick].items():
        out = _folder(work, size, dtype)
        for role in ("base", "refiner") if scale == "full" else ("base",):
            if (out / role).is_dir():
                continue
            sys.stderr.write(f"writing {out / role}\n")
            options = ["--out", str(out), "--size", size, "--dtype", dtype, f"--{role}"]
            done = measure([sys.executable, "-m", f"{_MODULE}checkpoints", *options])
            if not done.ok:
                raise SystemExit(f"error: the checkpoint {out / role} was not written: {done.output}")


if __name__ == "__main__":
    sys.exit(main())
