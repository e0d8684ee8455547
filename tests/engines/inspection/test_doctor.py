"""The doctor: what can start on machines of all kinds, and that broken packages cannot end it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sdxl_trt.engines.backends.cuda.driver import Driver, Gpu, Problem
from sdxl_trt.engines.backends.ort import probe
from sdxl_trt.engines.errors import IncompatibleError
from sdxl_trt.engines.inspection import doctor, provider_checks
from sdxl_trt.engines.inspection.doctor import DoctorReport, examine_machine
from sdxl_trt.engines.inspection.provider_checks import PROVIDERS, check_provider

NONE = Problem("no NVIDIA driver on this machine", "install the NVIDIA driver")
ADA = Gpu("NVIDIA GeForce RTX 4090", (8, 9), 25_282_281_472)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that replaces what is known of the installed packages."""

    def install(**versions: str) -> None:
        named = {name.replace("_", "-"): version for name, version in versions.items()}
        monkeypatch.setattr(provider_checks, "installed_version", named.get)

    return install


def test_the_installed_onnxruntime_starts_on_a_cpu() -> None:
    assert check_provider("ort-cpu") is None


def test_without_a_driver_nothing_else_is_asked(use_driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_driver(Driver(problem=NONE))
    monkeypatch.setattr(provider_checks, "_onnxruntime", lambda name: pytest.fail("imported"))
    assert {check_provider(name) for name in PROVIDERS if name not in ("ort-cpu", "openvino")} == {NONE}
    assert check_provider("openvino") is None


def test_a_missing_onnxruntime_is_the_one_for_the_provider(use_driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_driver(Driver((12, 4), (ADA,)))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for name, extra in (("ort-cpu", "cpu"), ("ort-cuda", "gpu-cu12"), ("ort-tensorrt", "gpu-cu12")):
        problem = check_provider(name)
        assert problem is not None
        assert problem.reason.startswith("onnxruntime does not import (")
        assert problem.remedy == f"pip install 'sdxl-trt[{extra}]'"


@pytest.mark.parametrize(("cuda", "extra"), [((13, 0), "tensorrt"), ((12, 8), "tensorrt-cu12")])
def test_missing_packages_are_those_that_the_driver_runs(
    use_driver: Any, packages: Any, cuda: tuple[int, int], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_driver(Driver(cuda, (ADA,)))
    packages()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    problem = check_provider("tensorrt")
    assert problem is not None
    assert problem.remedy == f"pip install 'sdxl-trt[{extra}]'"
    assert problem.reason.startswith("needs tensorrt (")


def test_tensorrt_starts_with_its_packages_and_a_gpu(simulated: Any, use_driver: Any, packages: Any) -> None:
    use_driver(Driver((13, 0), (ADA,)))
    packages(tensorrt_cu13_libs="11.4.0.106", cuda_bindings="13.5.0")
    assert check_provider("tensorrt") is None
    use_driver(Driver((12, 4), (ADA,)))
    assert check_provider("tensorrt") == Problem(
        "tensorrt-cu13-libs is built for CUDA 13, and the NVIDIA driver supports only CUDA 12.4",
        "pip uninstall -y tensorrt-cu13-libs cuda-bindings && pip install 'sdxl-trt[tensorrt-cu12]'",
    )
    packages(tensorrt_cu12_libs="11.4.0.106", cuda_bindings="12.9.10")
    assert check_provider("tensorrt") is None


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (Driver((12, 1), (ADA,)), "TensorRT needs NVIDIA driver r535, and this one supports only CUDA 12.1"),
        (
            Driver((12, 8), (Gpu("Tesla V100", (7, 0), 16 << 30),)),
            "the GPU has compute capability 7.0, and tensorrt needs 7.5 or higher",
        ),
    ],
)
def test_what_tensorrt_does_not_support_is_said(use_driver: Any, packages: Any, driver: Driver, reason: str) -> None:
    use_driver(driver)
    packages()
    problem = check_provider("tensorrt")
    assert problem is not None
    assert problem.reason == reason


def test_turing_runs_plans_of_tensorrt_and_none_for_rtx(use_driver: Any, packages: Any) -> None:
    use_driver(Driver((13, 0), (Gpu("Tesla T4", (7, 5), 16 << 30),)))
    packages()
    problem = check_provider("tensorrt")
    assert problem is None or problem.reason.startswith("needs tensorrt")
    assert check_provider("tensorrt-rtx") == Problem(
        "the GPU has compute capability 7.5, and tensorrt-rtx needs 8.0 or higher", "use --provider tensorrt"
    )


def test_a_package_that_raises_is_reinstalled(use_driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> None:
            raise SystemError("half\nan installation")

    monkeypatch.setitem(sys.modules, "onnxruntime", Broken("onnxruntime"))
    use_driver(Driver((13, 0), (ADA,)))
    assert check_provider("ort-cuda") == Problem(
        "SystemError: half an installation", "pip install --force-reinstall 'sdxl-trt[gpu]'"
    )


def test_packages_that_end_the_process_are_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In real processes."""
    package = tmp_path / "onnxruntime.py"
    package.write_text("import os\nos.kill(os.getpid(), 11)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(doctor, "PROVIDERS", ("ort-cpu",))
    report = examine_machine()
    problem = report.problems["ort-cpu"]
    assert problem is not None
    assert problem.reason == "importing its packages ended the process with signal 11"
    assert "sdxl-trt" in report.packages


def test_what_packages_print_is_no_answer() -> None:
    def ended(code: str) -> Problem | None:
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        return doctor._result("tensorrt", process)

    assert ended("print('welcome'); print('null')") is None
    assert ended("""print('["it is missing", "install it"]')""") == Problem("it is missing", "install it")
    problem = ended("import sys; print('welcome'); sys.stderr.write('first\\nno memory\\n'); sys.exit(9)")
    assert problem is not None
    assert problem.reason == "importing its packages ended the process with exit code 9: no memory"


def _report(**problems: Problem | None) -> DoctorReport:
    named = {name.replace("_", "-"): problem for name, problem in problems.items()}
    return DoctorReport(Driver((13, 0), (ADA,)), {"sdxl-trt": "0.1.0", "numpy": "2.4.6"}, named)


def test_the_report_is_aligned_and_groups_what_one_line_mends() -> None:
    driver = Problem("libcublas.so.13 is missing", "pip install 'sdxl-trt[gpu]'")
    report = _report(ort_cpu=None, ort_cuda=driver, ort_tensorrt=driver, tensorrt=None, tensorrt_rtx=NONE)
    lines = report.lines
    assert lines[:2] == [
        "driver    supports CUDA 13.0", "GPU 0     NVIDIA GeForce RTX 4090, compute capability 8.9, 25.28 GB",
    ]  # fmt: skip
    assert lines[3] == "packages  sdxl-trt 0.1.0, numpy 2.4.6"
    assert lines[5:] == [
        "provider        starts  why not",
        "  ort-cpu       yes",
        "  ort-cuda      no      libcublas.so.13 is missing",
        "  ort-tensorrt  no      libcublas.so.13 is missing",
        "  tensorrt      yes",
        "  tensorrt-rtx  no      no NVIDIA driver on this machine",
        "",
        "to mend:",
        "  ort-cuda, ort-tensorrt  pip install 'sdxl-trt[gpu]'",
        "  tensorrt-rtx            install the NVIDIA driver",
    ]
    assert json.loads(json.dumps(report.json)) == report.json
    assert report.json["gpus"][0]["memory"] == ADA.memory
    assert report.json["providers"]["ort-cuda"] == {
        "starts": False, "reason": "libcublas.so.13 is missing", "remedy": "pip install 'sdxl-trt[gpu]'",
    }  # fmt: skip


def test_long_reasons_are_wrapped_and_commands_are_not() -> None:
    report = _report(ort_cuda=Problem("word " * 40, "pip install " + "x" * 200))
    assert max(len(line) for line in report.lines if "pip" not in line) <= 100
    assert any(line.endswith("x" * 200) for line in report.lines)


def test_one_provider_on_a_gpu_is_enough() -> None:
    _report(ort_cpu=None, ort_cuda=NONE, tensorrt=None).require()
    with pytest.raises(IncompatibleError, match=r"^no provider can use a GPU here: no NVIDIA driver on this machine; "):
        _report(ort_cpu=None, ort_cuda=NONE, tensorrt=NONE).require()


def test_the_probe_asks_for_the_same_packages() -> None:
    """The probe's names of packages are among those of the report."""
    assert {f"{probe._PLUGIN}-cu12", f"{probe._PLUGIN}-cu13", "onnxruntime", "onnxruntime-gpu"} <= set(doctor.PACKAGES)
