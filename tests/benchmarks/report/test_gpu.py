"""gpu-check's figures in trt-bench's report: a column of their own, said to be of another machine."""

import json
from pathlib import Path

import msgspec
import pytest

from sdxl_trt.benchmarks.cli import main
from sdxl_trt.benchmarks.measure.gpu_record import CheckResult, Figure, GpuReport
from sdxl_trt.benchmarks.report.markdown import markdown_report
from sdxl_trt.benchmarks.report.pages import page
from sdxl_trt.benchmarks.report.records import BenchReport

STEP = (Figure("base UNet step", 0.0421, "s"), Figure("no task", 0.5, "s"), Figure("lowest cosine", 0.9999))
GPU = GpuReport(
    date="2026-01-02T03:04:05+00:00", gpu="A GPU", model="a pair",
    checks=(CheckResult("tensorrt: time per step", "ok", 1.0, "seen", STEP),
            CheckResult("tensorrt: memory", "ok", 1.0, "seen", (Figure("peak", 5.5e9, "B"),)),
            CheckResult("tensorrt: failed", "FAILED", 1.0, "seen", (Figure("time that means nothing", 1.0, "s"),))),
)  # fmt: skip


def test_the_figures_are_a_column_beside_ours(report: BenchReport) -> None:
    text = markdown_report(msgspec.structs.replace(report, gpu=GPU))
    assert "## A GPU, from a file" in text
    assert "another machine, and not this run" in text
    assert "2 ok, 1 FAILED, 0 not run" in text
    head, _, *rows = text[text.index("|  |  | sdxl-trt") :].splitlines()[:5]
    assert head == "|  |  | sdxl-trt, fp32, here | GPU (gpu-check, 2026-01-02, A GPU) |"
    assert rows == ["| tensorrt | base UNet step | 51.3 ms | 42.1 ms |", "| tensorrt | no task | – | 500 ms |",
                    "| tensorrt | peak | – | 5.50 GB |"]  # fmt: skip
    assert "time that means nothing" not in text
    assert "A GPU, from a file" not in markdown_report(report)


def test_hostile_names_stay_text(report: BenchReport) -> None:
    hostile = msgspec.structs.replace(
        report, gpu=msgspec.structs.replace(GPU, gpu="<script>x</script>|`", model="](x)")
    )
    assert "\\<script>x\\</script>\\|\\`" in markdown_report(hostile)
    assert "&lt;script&gt;" in page(hostile)
    assert "<script>" not in page(hostile)


def test_an_estimate_has_no_place_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--estimate", "h100", "--gpu-check", "report.json"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_a_file_that_is_no_report_ends_the_command_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdxl_trt.benchmarks.measure.find_subject", lambda *_: pytest.fail("it was not read first"))
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"schema": 1}))
    assert main(["--gpu-check", str(path)]) == 4
    assert capsys.readouterr().err.count("\n") == 1
