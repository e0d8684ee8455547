"""The doctor of trt-inspect: which providers can start on this machine, and the one line that mends each other one."""

__all__ = ["DoctorReport", "examine_machine", "relevant_packages"]

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_trt.engines.backends.cuda import Driver, Gpu, Problem, find_driver
from sdxl_trt.engines.errors import IncompatibleError
from sdxl_trt.engines.host import format_bytes, paragraph
from sdxl_trt.engines.inspection.provider_checks import PROVIDERS, installed_version

PACKAGES = (
    "sdxl-trt", "numpy", "onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-nv-tensorrt-rtx-cu12",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13", "openvino", "tensorrt-cu12", "tensorrt-cu12-libs", "tensorrt-cu13",
    "tensorrt-cu13-libs", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13", "cuda-bindings", "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13", "polygraphy",
)  # fmt: skip
_CHECKS = "sdxl_trt.engines.inspection.provider_checks"
_PATIENCE = 120
"""Seconds that one check may take; it imports packages, perhaps from a cold disk."""


@dataclass(frozen=True)
class DoctorReport:
    """The driver, the versions of installed packages, and for each provider why it cannot start; None if it can."""

    driver: Driver
    packages: Mapping[str, str]
    problems: Mapping[str, Problem | None]

    @property
    def lines(self) -> list[str]:
        """The report for people."""
        packages = ", ".join(f"{name} {version}" for name, version in self.packages.items())
        facts = [
            ("driver", _driver_words(self.driver)),
            *((f"GPU {index}", _gpu_words(gpu)) for index, gpu in enumerate(self.driver.gpus)),
            ("Python", f"{platform.python_version()}, {sys.platform}-{platform.machine()}"),
            ("packages", packages),
        ]
        lines = [line for name, words in facts for line in paragraph(f"{name:10}", words)]
        lines += ["", f"{'provider':14}  starts  why not"]
        for name, problem in self.problems.items():
            start = f"  {name:12}  {'yes' if problem is None else 'no':6}  "
            lines += paragraph(start, problem.reason if problem else "")
        remedies = self._remedies()
        width = max((len(names) for names in remedies.values()), default=0)
        if remedies:
            lines += ["", "to mend:"]
        # Not wrapped: a command is copied.
        return [*lines, *(f"  {names.ljust(width)}  {remedy}" for remedy, names in remedies.items())]

    def _remedies(self) -> dict[str, str]:
        """Return {remedy: the providers that it mends, joined by commas}, in the order of the providers."""
        found: dict[str, list[str]] = {}
        for name, problem in self.problems.items():
            if problem is not None:
                found.setdefault(problem.remedy, []).append(name)
        return {remedy: ", ".join(names) for remedy, names in found.items()}

    @property
    def json(self) -> dict[str, Any]:
        """The report for programs; memory is in bytes."""
        driver = self.driver
        return {
            "driver": {
                "cuda": ".".join(map(str, driver.cuda)) if driver.cuda else None,
                "problem": driver.problem.reason if driver.problem else None,
            },
            "gpus": [
                {"name": gpu.name, "compute_capability": ".".join(map(str, gpu.capability)), "memory": gpu.memory}
                for gpu in driver.gpus
            ],
            "python": platform.python_version(),
            "platform": f"{sys.platform}-{platform.machine()}",
            "packages": dict(self.packages),
            "providers": {
                name: {
                    "starts": problem is None,
                    "reason": problem.reason if problem else None,
                    "remedy": problem.remedy if problem else None,
                }
                for name, problem in self.problems.items()
            },
        }

    def require(self) -> None:
        """Raise IncompatibleError unless a provider that uses the GPU can start."""
        graphic = [problem for name, problem in self.problems.items() if name not in ("ort-cpu", "openvino")]
        if all(graphic):
            problem = self.driver.problem or next(filter(None, graphic))
            raise IncompatibleError(f"no provider can use a GPU here: {problem}")


def examine_machine() -> DoctorReport:
    """Return what is on this machine and what can start; each provider is tried in a process of its own.

    A process that imported one package finds libraries that the command itself would not find, and a broken library
    can end it. Never raises for a broken package.
    """
    running = {name: _start(name) for name in PROVIDERS}
    return DoctorReport(
        find_driver(), relevant_packages(), {name: _result(name, process) for name, process in running.items()}
    )


def _start(provider: str) -> subprocess.Popen[str]:
    """Start the check of `provider`; as in an installed command, -P keeps modules of the current folder out."""
    command = [sys.executable, "-P", "-m", _CHECKS, provider]
    return subprocess.Popen(  # noqa: S603 - this interpreter
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )


def _result(provider: str, process: subprocess.Popen[str]) -> Problem | None:
    """Wait for a check and return its result; a check that ends without one is a problem too."""
    remedy = "reinstall its packages into a new environment"
    with process:
        try:
            out, err = process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            return Problem(f"the check of {provider} took longer than {_PATIENCE} s", remedy)
    try:
        answer = json.loads(out.splitlines()[-1])
        return None if answer is None else Problem(*answer)
    except (ValueError, IndexError, TypeError):
        code = process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        words = err.splitlines()
        said = f": {words[-1]}" if words else ""
        return Problem(f"importing its packages ended the process with {how}{said}", remedy)


def relevant_packages() -> dict[str, str]:
    """Return {name: version} of the installed packages whose versions decide what can start."""
    return {name: version for name in PACKAGES if (version := installed_version(name)) is not None}


def _driver_words(driver: Driver) -> str:
    version = f"supports CUDA {driver.cuda[0]}.{driver.cuda[1]}" if driver.cuda else ""
    return ", but ".join(filter(None, (version, driver.problem.reason if driver.problem else "")))


def _gpu_words(gpu: Gpu) -> str:
    major, minor = gpu.capability
    return f"{gpu.name}, compute capability {major}.{minor}, {format_bytes(gpu.memory)}"
