"""The section of trt-bench's report on a GPU elsewhere: a column of gpu-check's figures beside those measured here."""

__all__ = ["gpu_section"]

from sdxl_trt.benchmarks.measure import Figure, GpuReport
from sdxl_trt.benchmarks.report.document import Section, Table
from sdxl_trt.benchmarks.report.quantities import memory, time_unit
from sdxl_trt.benchmarks.report.records import BenchReport
from sdxl_trt.benchmarks.report.timed import labels, our_names

_TASKS = {"base UNet step": "base UNet step", "refiner UNet step": "refiner UNet step", "VAE decode": "VAE decode"}
"""Tasks of trt-bench by gpu-check's name of the figure."""


def gpu_section(report: BenchReport) -> Section:
    """Return the figures of gpu-check beside ours, where both measured the same task; empty without a file."""
    gpu = report.gpu
    if gpu is None:
        return Section("gpu", "")
    ours = next(iter(our_names(report)), "")
    head = ("", "", f"{labels(report).get(ours, 'sdxl-trt')}, here", f"GPU (gpu-check, {gpu.date[:10]}, {gpu.gpu})")
    rows = tuple(
        (_provider(check.name), figure.name, _here(report, ours, figure), _shown(figure))
        for check in gpu.checks
        if check.outcome == "ok"
        for figure in check.figures
        if figure.unit in ("s", "B")
    )
    tables = (Table(head, rows, words=2),) if rows else ()
    return Section("gpu", "A GPU, from a file", _says(gpu), tables)


def _says(gpu: GpuReport) -> tuple[str, ...]:
    counts = {outcome: sum(check.outcome == outcome for check in gpu.checks) for outcome in ("ok", "FAILED", "not run")}
    where = (
        f"From the file of --gpu-check: another machine, and not this run. It checked {gpu.model}, with its own sizes"
        " and steps, one run each; so there is no ratio between the two columns."
    )
    return where, f"Its checks: {', '.join(f'{count} {outcome}' for outcome, count in counts.items())}."


def _provider(check: str) -> str:
    return check.partition(":")[0]


def _here(report: BenchReport, ours: str, figure: Figure) -> str:
    """Return this run's figure for the same task, or "–"."""
    measured = report.of(ours, _TASKS.get(figure.name, ""))
    return "–" if measured is None or not measured.seconds else time_unit([measured.median]).show(measured.median)


def _shown(figure: Figure) -> str:
    """Return the value of a figure in bytes or seconds with its unit."""
    return memory(figure.value) if figure.unit == "B" else time_unit([figure.value]).show(figure.value)
