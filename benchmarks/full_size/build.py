"""Measure plan builds at SDXL's real size, on a CPU, each in its own process: ``make bench-build``.

TensorRT for RTX's real builder makes the plans (`tensorrt_on_cpu`): memory and sizes are the builder's figures, build
times are this machine's, and nothing measures how fast a plan runs. Weights are random: no figure depends on them.
Of plans in 8 bits the builder's log tells which layers really compute in 8 bits (`layer_types`).
Writes JSON and a Markdown table beside it; graphs and checkpoints stay in ``--work`` and ``--checkpoints`` for the
next run, plans are deleted. ``--only`` takes patterns: ``--only '*8, static' --merge`` builds the plans in 8 bits and
keeps the other results.
"""

__all__ = ["Build", "Report", "bars", "main", "table"]

import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from sdxl_trt.benchmarks.full_size.build_cases import (
    SCHEMES,
    BuildCase,
    Export,
    cases,
    eight_bit_name,
    profile_words,
    rank_words,
)
from sdxl_trt.benchmarks.full_size.layer_types import Count, LayerTypes, count_layer_types
from sdxl_trt.benchmarks.full_size.tensorrt_on_cpu import BINDING, LIBRARIES, assemble, child_environment
from sdxl_trt.benchmarks.measure import (
    RESULTS_FOLDER,
    Bar,
    at_least,
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
from sdxl_trt.engines import SdxlTrtError, UsageError
from sdxl_trt.engines.build import BuildJob, BuiltPlan, build_plan, build_progress
from sdxl_trt.engines.bundle import Bundle, read_bundle
from sdxl_trt.engines.host import ProgressLine
from sdxl_trt.engines.plans import component_profiles, rank_range

MB, GB = 10**6, 10**9
RESULTS = RESULTS_FOLDER / "build.json"
_MODULE = "sdxl_trt.benchmarks.full_size."
_LOAD = (
    "Load is the machine's load average during a build, with the day; 1 is the build alone. Compare times of rows with"
    " similar load and the same processor only; a row names its own if it is another. Rows without a load are of a run"
    " before it was recorded."
)
_TYPES = (
    "Kernels of the plan, from the builder's log, and in brackets their share of the operations, of attentions of their"
    " number; queries, keys and values are one kernel. What the exporter leaves in fp16 counts too. The ranges of plans"
    " in 8 bits are assumed: neither sizes nor types depend on them."
)
_MODELS = {False: ("sdxl", "fp16"), True: ("tiny", "fp32")}


class Build(msgspec.Struct, frozen=True, omit_defaults=True):
    """The cost and result of one build, in bytes and seconds; `weights` are those of the ONNX graph.

    `profile_activations` are those of each profile, in order. `measured` is the day, `cpu_seconds` the processor's
    time, `load` the machine's load average as the build began or ended, whichever is larger: 1 is this build alone.
    They are "" and None in results from before they were recorded. `processor` is that of a build on another machine
    than the report's. `layer_types` are counted of plans in 8 bits.
    """

    component: str
    profiles: str
    weights: int
    plan: int
    activations: int
    layers: int
    parse_seconds: float
    seconds: float
    peak_anonymous: int
    peak_file: int
    profile_activations: tuple[int, ...] = ()
    measured: str = ""
    cpu_seconds: float | None = None
    load: float | None = None
    processor: str = ""
    layer_types: LayerTypes | None = None


class Report(msgspec.Struct, frozen=True):
    """Everything that one run measured."""

    machine: dict[str, str | int]
    versions: dict[str, str]
    quick: bool
    builds: dict[str, Build]
    failed: dict[str, str]
    bars: list[Bar]


def measure_build(case: BuildCase, bundle: Bundle, folder: Path) -> Build:
    """Build the plan of `case` in its own process, delete it, and return the figures. Raises as `build_plan`."""
    component = bundle.manifest.components[case.component]
    inputs = {spec.name: spec.shape for spec in component.inputs}
    plan, graph = folder / "plan", component.planned_graph(case.lora_rank)
    if graph is None:
        raise UsageError(f"{bundle.root}: was exported without a graph for LoRAs; delete the folder and run again")
    job = BuildJob(
        component=case.component,
        graph=bundle.path(graph),
        profiles=component_profiles(inputs, list(case.axes)),
        flavour="tensorrt-rtx",
        plan=plan,
        lora_rank=rank_range(case.lora_rank) if case.lora_rank else None,
        log=folder / f"{case.name.replace(' ', '-').replace(':', '-').replace(',', '')}.log",
    )
    if case.export.eight_bit:
        job = msgspec.structs.replace(job, list_layers=True)
    load, used = load_average(), _children_seconds()
    try:
        with ProgressLine() as line:
            built = build_plan(job, progress=build_progress(line))
    finally:
        plan.unlink(missing_ok=True)
    figures = _figures(case, built, component.weights.size)
    return msgspec.structs.replace(
        figures,
        cpu_seconds=round(_children_seconds() - used, 1),
        load=round(max(load, load_average()), 1),
        layer_types=count_layer_types(job.log) if job.list_layers else None,
    )


def _children_seconds() -> float:
    """Return the processor's time that ended children of this process have used."""
    times = os.times()
    return times.children_user + times.children_system


def _figures(case: BuildCase, built: BuiltPlan, weights: int) -> Build:
    return Build(
        component=case.component,
        profiles="; ".join(profile_words(axes) for axes in case.axes) + rank_words(case.lora_rank),
        weights=weights,
        plan=built.size,
        activations=built.activations,
        layers=built.layers,
        parse_seconds=built.parse_seconds,
        seconds=built.seconds,
        peak_anonymous=built.peak_anonymous,
        peak_file=built.peak_file,
        profile_activations=built.profile_activations,
        measured=datetime.now(UTC).date().isoformat(),
    )


def merged(report: Report, path: Path) -> Report:
    """Return `report` with the builds in the results at `path` that it lacks; `report` unchanged if there are none.

    The machine is that of the results, and builds on another one name its processor. Only results of the same versions
    may stand side by side: raises UsageError for others.
    """
    if not path.exists():
        return report
    before = msgspec.json.decode(path.read_bytes(), type=Report)
    if (before.versions, before.quick) != (report.versions, report.quick):
        raise UsageError(f"--merge: {path} has results of another version or size; run all cases again")
    words = [f"{each.machine.get('processor')}, {each.machine.get('cores')} cores" for each in (before, report)]
    own = "" if words[0] == words[1] else words[1]
    new = {name: msgspec.structs.replace(build, processor=own) for name, build in report.builds.items()}
    builds = before.builds | new
    ordered = {case.name: builds[case.name] for case in cases() if case.name in builds}
    failed = {name: reason for name, reason in (before.failed | report.failed).items() if name not in ordered}
    return msgspec.structs.replace(before, builds=ordered, failed=failed, bars=bars(ordered))


def bars(builds: Mapping[str, Build]) -> list[Bar]:
    """Return the bars with the measured figures; builds that failed or did not run count as not measured."""
    found = []
    for model, limit in (("base", 310 * MB), ("refiner", 340 * MB)):
        build = builds.get(f"{model} UNet, static")
        what = f"{model} UNet, static 1024², 2 rows"
        found += [
            _size(f"{what}: activations", build, limit),
            _times(f"{what}: plan, against the weights", build, "plan", 1.03),
            _times(f"{what}: peak anonymous memory, against the weights", build, "peak_anonymous", 2.3),
        ]
    for precision in ("fp16", "bf16"):
        build = builds.get(f"VAE decoder {precision}, static")
        found.append(_size(f"VAE decode {precision}, 1024²: activations", build, 1500 * MB))
    for precision, limit in (("bf16", 1500 * MB), ("fp32", 800 * MB)):
        exported = builds.get(f"VAE decoder {precision}, as exported")
        found.append(_size(f"VAE decode {precision}, any size and batch, as exported: activations", exported, limit))
    tile = builds.get("VAE decoder fp32, 512² tile")
    found.append(_size("VAE decode fp32, in 512² tiles: activations", tile, 800 * MB))
    for model in ("base", "refiner"):
        for scheme in SCHEMES:
            found += _eight_bit_bars(builds, model, scheme)
    return found


def _eight_bit_bars(builds: Mapping[str, Build], model: str, scheme: str) -> list[Bar]:
    floats, build = builds.get(f"{model} UNet, static"), builds.get(eight_bit_name(model, scheme))
    types = None if build is None else build.layer_types
    ratio = None if build is None or floats is None else build.plan / floats.plan
    what = f"{model} UNet {scheme.upper()}"
    found = [
        at_most(f"{what}: plan, against fp16's", ratio, 0.56, "0.56 times", lambda times: f"{times:.3f} times"),
        _share(f"{what}: linear layers in 8 bits, of their operations", None if types is None else types.linears, 0.95),
        _share(
            f"{what}: convolutions in 8 bits, of their operations", None if types is None else types.convolutions, 0.8
        ),
    ]
    if scheme == "fp8":
        found.append(
            _share(f"{what}: attentions in 8 bits, of their number", None if types is None else types.attentions, 1.0)
        )
    return found


def _share(what: str, count: Count | None, least: float) -> Bar:
    return at_least(what, None if count is None else count.share, least, f"{least:.0%}", lambda share: f"{share:.1%}")


def _size(what: str, build: Build | None, limit: int) -> Bar:
    value = None if build is None else build.activations
    return at_most(what, value, limit, f"{limit / MB:.0f} MB", lambda size: f"{size / MB:.0f} MB")


def _times(what: str, build: Build | None, figure: str, limit: float) -> Bar:
    value = None if build is None else getattr(build, figure) / build.weights
    return at_most(what, value, limit, f"{limit} times", lambda times: f"{times:.3f} times")


def table(report: Report) -> str:
    """Return the report as Markdown: the bars, then the builds."""
    size = "tiny models: these figures test the benchmark, not the build" if report.quick else "SDXL's real size"
    lines = [f"Plan builds on a CPU, {size}. {machine_words(report.machine)}.", "", *bars_table(report.bars)]
    lines += [
        "",
        "| plan | profiles | activations | weights | plan | layers | parsed in | built in | anonymous | files | load |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(name, build) for name, build in report.builds.items()]
    lines += [f"| {name} | failed: {reason} | | | | | | | | | |" for name, reason in report.failed.items()]
    if any(build.load is not None for build in report.builds.values()):
        lines += ["", _LOAD]
    lines += _layer_types_table(report.builds)
    return "\n".join(lines) + "\n"


def _layer_types_table(builds: Mapping[str, Build]) -> list[str]:
    """Return the table of what computes in 8 bits, no lines if nothing does."""
    lines = []
    for name, build in builds.items():
        if build.layer_types is not None:
            types = build.layer_types
            counts = (types.linears, types.convolutions, types.attentions)
            cells = [f"{count.eight_bit} of {count.all} ({count.share:.1%})" for count in counts]
            lines.append("| " + " | ".join([name, *cells, str(types.fused_attentions)]) + " |")
    if not lines:
        return []
    head = ["| plan | linear layers in 8 bits | convolutions in 8 bits | attentions in 8 bits | attentions fused |"]
    return ["", *head, "|---|---|---|---|---|", *lines, "", _TYPES]


def _row(name: str, build: Build) -> str:
    plan = f"{build.plan / GB:.3f} GB ({build.plan / build.weights:.3f}×)"
    anonymous = f"{build.peak_anonymous / GB:.2f} GB ({build.peak_anonymous / build.weights:.2f}×)"
    activations = ", ".join(f"{size / MB:.0f}" for size in build.profile_activations or (build.activations,))
    load = "" if build.load is None else f"{build.load:.1f} on {build.measured}"
    load += f", {build.processor}" if build.processor else ""
    seconds = f"{build.seconds:.0f} s" + ("" if build.cpu_seconds is None else f" ({build.cpu_seconds:.0f} s of CPU)")
    cells = [
        name, build.profiles, f"{activations} MB", f"{build.weights / GB:.3f} GB", plan,
        str(build.layers), f"{build.parse_seconds:.2f} s", seconds, anonymous,
        f"{build.peak_file / GB:.2f} GB", load,
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    """Build, write the results and return 1 if a build failed or a bar was missed, else 0."""
    prog = f"{_MODULE}build"
    parser = results_parser(prog, __doc__, work=Path("out/bench-build"), results=RESULTS, case="plan")
    checkpoints = Path("out/bench-export/checkpoints")
    parser.add_argument("--checkpoints", type=Path, default=checkpoints, help="folder for random weights")
    parser.add_argument("--merge", action="store_true", help="keep the results of the cases that --only leaves out")
    arguments = parser.parse_args(argv)
    chosen = [case for case in cases() if any(fnmatchcase(case.name, wanted) for wanted in arguments.only or "*")]
    if not chosen:
        parser.error(f"--only {' '.join(arguments.only)}: the plans are {'; '.join(case.name for case in cases())}")
    os.environ.update(child_environment(assemble()))
    report = _run(chosen, arguments.checkpoints, arguments.work, quick=arguments.quick)
    if arguments.merge:
        report = merged(report, arguments.results)
    write_results(report, table(report), arguments.results)
    sys.stdout.write(table(report))
    for name, reason in report.failed.items():
        sys.stderr.write(f"error: {name}: {reason}\n")
    return 1 if report.failed or (not arguments.quick and missed(report.bars)) else 0


def _run(chosen: Sequence[BuildCase], checkpoints: Path, work: Path, *, quick: bool) -> Report:
    size, dtype = _MODELS[quick]
    source = checkpoints / f"{size}-{dtype}"
    folder = work / size
    folder.mkdir(parents=True, exist_ok=True)
    exports = dict.fromkeys(case.export for case in chosen)
    needed = dict.fromkeys(export.floats or export for export in exports)
    bundles = {export: _export(export, source, folder) for export in needed}
    bundles |= {each: _quantized(each, bundles[each.floats], folder) for each in exports if each.floats is not None}
    builds: dict[str, Build] = {}
    failed: dict[str, str] = {}
    for case in chosen:
        sys.stderr.write(f"{case.name}\n")
        try:
            builds[case.name] = measure_build(case, bundles[case.export], folder)
        except SdxlTrtError as exc:
            # Leave this machine's paths out of the report.
            failed[case.name] = str(exc).replace(f"{Path.cwd()}/", "")
    versions = package_versions(("sdxl-trt", BINDING, LIBRARIES))
    return Report(machine(), versions, quick, builds, failed, bars(builds))


def _export(export: Export, source: Path, folder: Path) -> Bundle:
    """Return the bundle, exported by a subprocess; missing checkpoints are first written by others."""
    roles = ("base",) if "--no-refiner" in export.options else ("base", "refiner")
    for role in roles:
        if not (source / role).is_dir():
            size, _, dtype = source.name.rpartition("-")
            options = ["--out", str(source), "--size", size, "--dtype", dtype, f"--{role}"]
            _do([sys.executable, "-m", f"{_MODULE}checkpoints", *options])
    out = folder / export.name
    given = [option for role in roles for option in (f"--{role}", str(source / role))]
    options = [*given, *export.options, "--engine", "none", "--out", str(out)]
    _do([sys.executable, "-m", f"{_MODULE}exporters", "ours", *options])
    return read_bundle(out, partial=True)


def _quantized(export: Export, floats: Bundle, folder: Path) -> Bundle:
    """Return the bundle with UNets in 8 bits, made of `floats` by a subprocess."""
    out = folder / export.name
    _do([sys.executable, "-m", f"{_MODULE}exporters", "eight-bit", str(export.eight_bit), str(floats.root), str(out)])
    return read_bundle(out, partial=True)


def _do(command: list[str]) -> None:
    sys.stderr.write(" ".join(command[2:]) + "\n")
    done = measure(command)
    if not done.ok:
        raise SystemExit(f"error: {' '.join(command[2:])}: {done.output}")


if __name__ == "__main__":
    sys.exit(main())
