"""gpu-check's JSON comes from anybody: what is not a report is refused in one line."""

from pathlib import Path

import msgspec
import pytest

from sdxl_trt.benchmarks.measure.gpu_record import CheckResult, Figure, GpuReport, read_gpu_report
from sdxl_trt.engines.errors import CorruptError, SdxlTrtError, UsageError

REPORT = GpuReport(date="2026-01-02T03:04:05+00:00", gpu="A GPU", model="a pair", facts={"GPU": "A GPU"},
                   checks=(CheckResult("one", "ok", 1.0, "seen", (Figure("time", 0.5, "s"),)),))  # fmt: skip


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(msgspec.json.encode(REPORT))
    assert read_gpu_report(path) == REPORT


@pytest.mark.parametrize(("content", "said"), [
    (b"", "not a report of gpu-check"),
    (b"[]", "not a report of gpu-check"),
    (b'{"date": "x"}', "missing required field `gpu`"),
    (msgspec.json.encode(REPORT).replace(b'"value":0.5', b'"value":"a lot"'), "Expected `float`"),
    (msgspec.json.encode(REPORT).replace(b'"value":0.5', b'"value":NaN'), "not a report of gpu-check"),
    (msgspec.json.encode(REPORT).replace(b'"unit":"s"', b'"unit":"h"'), "Invalid enum value 'h'"),
    (msgspec.json.encode(REPORT).replace(b'"ok"', b'"fine"'), "Invalid enum value 'fine'"),
    (msgspec.json.encode(REPORT).replace(b'"A GPU"', b'"' + b"A" * 5000 + b'"'), "length <= 4000"),
    (msgspec.json.encode(REPORT).replace(b'"schema":1', b'"schema":2'), "has schema 2, this version reads 1"),
])  # fmt: skip
def test_what_is_not_a_report_is_refused_in_one_line(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(CorruptError, match="--gpu-check") as raised:
        read_gpu_report(path)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_missing_or_too_large_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b" " * ((4 << 20) + 1))
    errors: list[SdxlTrtError] = []
    for name in ("missing", "large"):
        with pytest.raises(UsageError, match="--gpu-check") as raised:
            read_gpu_report(tmp_path / name)
        errors.append(raised.value)
    assert "larger than 4 MiB" in str(errors[1])
