"""What gpu-check found, as a record: the JSON that it writes, and that trt-bench reads from any machine."""

__all__ = ["CheckResult", "Figure", "GpuReport", "Outcome", "Unit", "read_gpu_report"]

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from sdxl_trt.engines import CorruptError
from sdxl_trt.engines.host import one_line, read_capped

SCHEMA = 1
"""Incremented when a field is removed or changes its meaning, not when one is added."""
_MOST_BYTES = 4 << 20
_OPTION = "--gpu-check"

Outcome = Literal["ok", "FAILED", "skipped", "not run"]
Unit = Literal["s", "B", "dB", ""]
"""Seconds, bytes, decibels; a cosine or a count has none."""
Text = Annotated[str, msgspec.Meta(max_length=4000)]


class Figure(msgspec.Struct, frozen=True):
    """A measured value by its name, in its `unit`."""

    name: Text
    value: float
    unit: Unit = ""


class CheckResult(msgspec.Struct, frozen=True):
    """The result of a check. `seen` is one line: what it found, or why it failed, was skipped or did not run."""

    name: Text
    outcome: Outcome
    seconds: float
    seen: Text
    figures: tuple[Figure, ...] = ()


class GpuReport(msgspec.Struct, frozen=True, kw_only=True):
    """One run of gpu-check.

    `date` is ISO 8601 in UTC, `gpu` names the device, `model` says which pair was checked; `checks` are in the order of
    the run.
    """

    schema: int = SCHEMA
    date: Text
    gpu: Text
    model: Text
    facts: dict[Text, Text] = {}
    checks: tuple[CheckResult, ...] = ()


def read_gpu_report(path: Path) -> GpuReport:
    """Return the report in the file `path`, which may come from anybody.

    Raises UsageError for a file that is missing, unreadable or larger than 4 MiB, CorruptError for one that is not a
    report or has another schema.
    """
    write_one = "write one with: python -m sdxl_trt.benchmarks.gpu_check --out DIR"
    try:
        report = msgspec.json.decode(read_capped(path, _MOST_BYTES, _OPTION), type=GpuReport)
    except msgspec.MsgspecError as exc:
        raise CorruptError(f"{_OPTION} {path}: not a report of gpu-check ({one_line(str(exc))}); {write_one}") from exc
    if report.schema != SCHEMA:
        raise CorruptError(f"{_OPTION} {path}: has schema {report.schema}, this version reads {SCHEMA}; {write_one}")
    return report
