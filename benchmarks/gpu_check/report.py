"""gpu-check's report as Markdown, to paste in an issue."""

__all__ = ["markdown", "without_gpu"]

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from sdxl_trt.benchmarks.measure import CheckResult, Figure, GpuReport, Outcome
from sdxl_trt.engines.host import format_bytes, one_line

TITLE = "# GPU check of sdxl-trt"
_MANY = 3
_OUTCOMES: tuple[Outcome, ...] = ("ok", "FAILED", "skipped", "not run")


def markdown(report: GpuReport) -> str:
    """Return the whole report: the machine, the checks, and their figures."""
    facts = {"date": report.date, "checked": report.model, **report.facts}
    counts = [f"{sum(each.outcome == outcome for each in report.checks)} {outcome}" for outcome in _OUTCOMES]
    lines = [TITLE, "", *_facts(facts), "", f"**{', '.join(counts)}.**", ""]
    lines += ["| check | outcome | seconds | seen |", "|---|---|---|---|", *map(_row, _folded(report.checks)), ""]
    figures = [(check.name, figure) for check in report.checks for figure in check.figures]
    if figures:
        lines += ["Figures of one run each: they show that it runs and where time and memory go; no benchmark.", ""]
        lines += ["| check | figure | value |", "|---|---|---|"]
        lines += [f"| {_cell(name)} | {_cell(figure.name)} | {_value(figure)} |" for name, figure in figures] + [""]
    return "\n".join(lines)


def without_gpu(facts: Mapping[str, str], reason: str) -> str:
    """Return the report of a machine on which nothing can be checked, for `reason`."""
    return "\n".join([TITLE, "", *_facts(facts), "", f"**no GPU**: {one_line(reason)}. Nothing was checked.", ""])


def _facts(facts: Mapping[str, str]) -> Sequence[str]:
    return [f"- {name}: {one_line(value)}" for name, value in facts.items()]


def _folded(checks: Sequence[CheckResult]) -> list[CheckResult]:
    """Return the checks; many of one provider that were skipped for the same reason are one, in the first's place."""
    alike = Counter((_provider(check), check.seen) for check in checks if check.outcome == "skipped")
    kept: dict[tuple[str, str], CheckResult] = {}
    for check in checks:
        key = (_provider(check), check.seen)
        if check.outcome == "skipped" and alike[key] >= _MANY:
            kept.setdefault(key, msgspec.structs.replace(check, name=f"{key[0]}: {alike[key]} checks"))
        else:
            kept[check.name, ""] = check
    return list(kept.values())


def _provider(check: CheckResult) -> str:
    return check.name.partition(":")[0]


def _row(check: CheckResult) -> str:
    outcome = f"**{check.outcome}**" if check.outcome == "FAILED" else check.outcome
    return f"| {_cell(check.name)} | {outcome} | {check.seconds:.1f} | {_cell(check.seen)} |"


def _value(figure: Figure) -> str:
    if figure.unit == "B":
        return format_bytes(int(figure.value))
    if figure.unit == "s":
        return f"{figure.value * 1e3:.2f} ms" if figure.value < 1 else f"{figure.value:.2f} s"
    return f"{figure.value:.6g} {figure.unit}".rstrip()


def _cell(text: str) -> str:
    return one_line(text).replace("|", "\\|")
