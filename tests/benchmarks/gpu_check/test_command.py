"""The command: its options, its report and its exit codes."""

import threading
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.benchmarks.gpu_check import __main__ as gpu_check
from sdxl_trt.benchmarks.gpu_check.__main__ import main
from sdxl_trt.benchmarks.gpu_check.checks import Check, Finding, Workplace
from sdxl_trt.benchmarks.gpu_check.checks.sampler import MemorySampler, _Reader
from sdxl_trt.benchmarks.gpu_check.child import run_check
from sdxl_trt.benchmarks.gpu_check.report import markdown
from sdxl_trt.benchmarks.measure import gpu as measured_gpu
from sdxl_trt.benchmarks.measure.energy import Nvml
from sdxl_trt.benchmarks.measure.gpu_record import CheckResult, Figure, GpuReport
from sdxl_trt.engines import ResourceError
from sdxl_trt.engines.backends.cuda import driver
from sdxl_trt.engines.backends.cuda.driver import Driver, Gpu, Problem


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command find a GPU."""
    monkeypatch.setattr(gpu_check, "no_driver", lambda: None)
    monkeypatch.setattr(gpu_check, "device_available", lambda: None)


def _run(arguments: list[str], *checks: Check) -> int:
    return main(arguments, lambda folder: lambda check, _: run_check(check, Workplace(folder)), checks)


def test_without_a_gpu_the_report_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_check, "no_driver", lambda: "no NVIDIA driver on this machine")
    for arguments in ([], ["--look"]):
        assert main(arguments) == 3
        out = capsys.readouterr().out
        assert "**no GPU**: no NVIDIA driver on this machine. Nothing was checked." in out
        assert "- system: " in out
        assert "| check |" not in out


@pytest.mark.parametrize(
    ("cuda", "extras"), [((13, 0), "gpu,tensorrt,verify"), ((12, 4), "gpu-cu12,tensorrt-cu12,verify")]
)
def test_look_prints_the_extras_that_the_driver_runs(
    cuda: tuple[int, int], extras: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "find_driver", lambda: Driver(cuda, (Gpu("a GPU", (8, 9), 1),)))
    monkeypatch.setattr(gpu_check, "no_driver", lambda: None)
    assert main(["--look"]) == 0
    assert capsys.readouterr().out == f"{extras}\n"


def test_the_driver_says_why_it_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("the NVIDIA driver finds no GPU", "look for it")
    monkeypatch.setattr(measured_gpu, "find_driver", lambda: Driver((13, 0), problem=problem))
    assert measured_gpu.no_driver() == "the NVIDIA driver finds no GPU; look for it"
    monkeypatch.setattr(measured_gpu, "find_driver", lambda: Driver((13, 0), (Gpu("a GPU", (8, 9), 1),)))
    assert measured_gpu.no_driver() is None


@pytest.mark.usefixtures("gpu")
def test_an_interrupt_keeps_what_was_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def interrupted(_: Workplace) -> Finding:
        raise KeyboardInterrupt

    checks = Check("one", lambda _: Finding("seen")), Check("two", interrupted), Check("three", _fails)
    assert _run(["--quick", "--out", str(tmp_path)], *checks) == 130
    out, error = capsys.readouterr()
    assert "| one | ok |" in out
    for name in ("two", "three"):
        assert f"| {name} | not run | 0.0 | the run was interrupted |" in out
    assert (tmp_path / "report.md").read_text() == out
    assert error.endswith("error: interrupted; the plans built so far are kept\n")


@pytest.mark.usefixtures("gpu")
def test_a_report_that_cannot_be_written_is_printed_all_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise ResourceError("no space left")

    monkeypatch.setattr(gpu_check, "write_results", full)
    assert _run(["--quick", "--out", str(tmp_path)], Check("one", lambda _: Finding("seen"))) == ResourceError.exit_code
    out, error = capsys.readouterr()
    assert "| one | ok |" in out
    assert error.endswith("error: no space left\n")


def _fails(_: Workplace) -> Finding:
    raise AssertionError("wrong")


@pytest.mark.usefixtures("gpu")
def test_a_failure_stops_no_other_check_and_makes_the_exit_code_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checks = Check("one", _fails), Check("two", lambda _: Finding("seen"))
    assert _run(["--quick", "--out", str(tmp_path)], *checks) == 1
    out = capsys.readouterr().out
    assert "| one | **FAILED** |" in out
    assert "| two | ok |" in out
    assert _run(["--quick", "--out", str(tmp_path), "--only", "tw"], *checks) == 0


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("arguments", "said"), [
    ([], "there is no pair to check; make it with: python -m sdxl_trt.benchmarks.gpu_check.pair --out"),
    (["--bundle", "nowhere"], "nowhere"),
    (["--quick", "--only", "three"], "--only 'three': no check's name contains it; for example: one"),
])  # fmt: skip
def test_what_cannot_be_checked_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run([*arguments, "--out", str(tmp_path)], Check("one", _fails)) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert said in error


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "1e9", "x"])
def test_minutes_are_a_number_above_zero(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([f"--minutes={minutes}"])
    assert "--minutes" in capsys.readouterr().err


def test_the_report_can_be_pasted() -> None:
    figures = (
        Figure("time", 0.0125, "s"),
        Figure("size", 3 << 30, "B"),
        Figure("cosine", 0.99987),
        Figure("all", 12.5, "s"),
    )
    checks = (CheckResult("first", "FAILED", 1.25, "bad | worse"), CheckResult("second", "ok", 0.0, "fine", figures),
              CheckResult("third", "not run", 0.0, "out of time"))  # fmt: skip
    text = markdown(GpuReport(date="2026-01-02T03:04:05+00:00", gpu="A GPU", model="a pair", facts={"GPU": "A\nGPU"},
                              checks=checks))  # fmt: skip
    assert "- date: 2026-01-02T03:04:05+00:00\n- checked: a pair\n- GPU: A GPU\n" in text
    assert "**1 ok, 1 FAILED, 0 skipped, 1 not run.**" in text
    assert "| first | **FAILED** | 1.2 | bad \\| worse |" in text
    for row in ("time | 12.50 ms", "size | 3.22 GB", "cosine | 0.99987", "all | 12.50 s"):
        assert f"| second | {row} |" in text


def test_many_checks_that_were_skipped_for_one_reason_are_one_row() -> None:
    checks = (CheckResult("a: one", "skipped", 0, "why"), CheckResult("b: one", "ok", 0, "why"),
              CheckResult("a: two", "skipped", 0, "why"), CheckResult("a: three", "skipped", 0, "why"),
              CheckResult("c: one", "skipped", 0, "few"), CheckResult("c: two", "skipped", 0, "few"))  # fmt: skip
    rows = [line for line in markdown(GpuReport(date="", gpu="", model="", checks=checks)).splitlines() if ": " in line]
    assert rows[2:] == ["| a: 3 checks | skipped | 0.0 | why |", "| b: one | ok | 0.0 | why |",
                        "| c: one | skipped | 0.0 | few |", "| c: two | skipped | 0.0 | few |"]  # fmt: skip


def test_a_late_low_sample_does_not_overwrite_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first reading is in progress when another thread takes a sample that is higher."""
    memory = MemorySampler()
    reading, go_on, values = threading.Event(), threading.Event(), iter([0, 7])

    def read() -> int:
        value = next(values)
        if value == 0:
            reading.set()
            go_on.wait(60)
        return value

    monkeypatch.setattr(memory, "_read", read)
    low = threading.Thread(target=memory.sample)
    low.start()
    reading.wait(60)
    high = threading.Thread(target=memory.sample)
    high.start()
    high.join(0.01)  # it ends only if nothing keeps the two apart
    go_on.set()
    low.join()
    high.join()
    assert memory.peak == 7


class _Library:
    """A stand-in for NVML with some GPUs, of which the first uses 5 bytes."""

    def __init__(self, count: int) -> None:
        self._count = count

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, device: Any) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self._count
        return 0

    def nvmlDeviceGetMemoryInfo(self, device: Any, usage: Any) -> int:  # noqa: N802
        usage._obj.used = 5
        return 0


@pytest.mark.parametrize(("count", "visible", "used"), [(1, None, 5), (2, None, 0), (1, "1", 0)])
def test_nvml_is_asked_only_if_its_gpu_is_cuda_s(
    count: int, visible: str | None, used: int, simulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simulated device, which CUDA is asked about, uses nothing."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _Reader(Nvml(_Library(count)))() == used


def test_memory_is_sampled_by_a_thread(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken and freed between two steps is in the peak: the test waits for a sample instead of some time."""
    from sdxl_trt.engines.backends.cuda import Cuda, DeviceBuffer

    cuda = Cuda()
    with MemorySampler() as memory:
        block = DeviceBuffer(cuda, 1 << 20, "a block")
        calls = simulated.calls["cudaMemGetInfo"]
        while simulated.calls["cudaMemGetInfo"] < calls + 2:
            memory._end.wait(0.001)
        block.free()
    assert memory.grown == 1 << 20
