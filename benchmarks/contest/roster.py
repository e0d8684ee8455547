"""The contestants of trt-bench: their titles, commands and environments, and why one cannot run here."""

__all__ = [
    "FAST",
    "FASTEST",
    "OURS",
    "OURS_INT8",
    "PRESETS",
    "ROSTER",
    "Entry",
    "choose",
    "command",
    "cores",
    "environment",
    "shown",
    "unable",
]

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from sdxl_trt.engines import UsageError

Need = Literal["checkpoint", "gpu", "cpu", "peers"]
PEERS = Path(".venv-peers/bin/python")
_HERE = Path(__file__).resolve().parents[2]
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Entry:
    """A contestant: its name in --against, its title in reports, and its requirements.

    `modules` must be installed in this environment; entries that need "peers" run in theirs (``make peers``).
    """

    name: str
    title: str
    needs: tuple[Need, ...] = ()
    modules: tuple[str, ...] = ()
    slow: bool = False
    """Whether it takes minutes to prepare."""


_EXPORT = ("torch", "diffusers", "transformers", "onnx")
_TORCH = ("torch", "diffusers", "transformers")
_OPENVINO: tuple[Need, ...] = ("checkpoint", "cpu", "peers")
ROSTER = {
    entry.name: entry
    for entry in (
        Entry("sdxl-trt", "sdxl-trt"),
        Entry("sdxl-trt-int8", "sdxl-trt, UNets and decoder in int8", ("checkpoint", "cpu"), _EXPORT, slow=True),
        Entry("sdxl-trt-openvino", "sdxl-trt on OpenVINO", ("cpu",), ("openvino",)),
        Entry("sdxl-trt-fast", "sdxl-trt --fast"),
        Entry("sdxl-trt-fastest", "sdxl-trt --fastest"),
        Entry("sdxl-trt-fastest-openvino", "sdxl-trt --fastest on OpenVINO", ("cpu",), ("openvino",)),
        Entry("ort-cuda", "sdxl-trt on ONNX Runtime's CUDA", ("gpu",)),
        Entry("ort-tensorrt", "sdxl-trt on ONNX Runtime's TensorRT", ("gpu",)),
        Entry("tensorrt", "sdxl-trt on TensorRT", ("gpu",)),
        Entry("onnxruntime", "plain ONNX Runtime", ("cpu",), ("onnxruntime",)),
        Entry("eager", "PyTorch eager", ("checkpoint",), _TORCH),
        Entry("eager-bf16", "PyTorch eager, bf16", ("checkpoint",), _TORCH),
        Entry("eager-fp16", "PyTorch eager, fp16", ("checkpoint", "gpu"), _TORCH),
        Entry("compile", "PyTorch torch.compile", ("checkpoint",), _TORCH, slow=True),
        Entry("compile-bf16", "PyTorch torch.compile, bf16", ("checkpoint",), _TORCH, slow=True),
        Entry("diffusers", "diffusers' own pipelines", ("checkpoint",), _TORCH),
        Entry("optimum", "optimum-onnx, its own export", ("checkpoint", "cpu", "peers"), slow=True),
        Entry("openvino", "OpenVINO, static shapes", _OPENVINO, slow=True),
        Entry("openvino-bf16", "OpenVINO, bf16 hint", _OPENVINO, slow=True),
        Entry("openvino-int8", "OpenVINO, NNCF int8, its default scope", _OPENVINO, slow=True),
        Entry("openvino-int8-scoped", "OpenVINO, NNCF int8, our exclusions", _OPENVINO, slow=True),
        Entry("openvino-int8-bf16", "OpenVINO, NNCF int8, our exclusions, bf16 hint", _OPENVINO, slow=True),
    )
}
OURS, OURS_INT8, FAST, FASTEST = "sdxl-trt", "sdxl-trt-int8", "sdxl-trt-fast", "sdxl-trt-fastest-openvino"
"""Those of this project whose time is divided by the others'; FASTEST draws a picture in the least time on a CPU."""
PRESETS = (FAST, "sdxl-trt-fastest", FASTEST)
"""Those of this project that draw a picture with a preset's steps."""


def choose(against: str | None) -> list[Entry]:
    """Return the contestants of ``--against NAME,NAME`` (default: all), ours first; "none" is only ours.

    Raises UsageError for an unknown name.
    """
    names = list(ROSTER) if against is None else _names(against)
    return [ROSTER[name] for name in dict.fromkeys([OURS, *names])]


def _names(against: str) -> list[str]:
    names = [name.strip() for name in against.split(",") if name.strip()]
    if names == ["none"]:
        return []
    unknown = [name for name in names if name not in ROSTER]
    if unknown or not names:
        known = ", ".join(name for name in ROSTER if name != OURS)
        raise UsageError(
            f"--against {against}: {unknown[0] if unknown else 'nobody'} is unknown; choose from: {known}, or none"
        )
    return names


def unable(entry: Entry, *, checkpoint: bool, gpu: bool, quick: bool = False) -> str:
    """Return why a contestant cannot run here, or "" if it can; `quick` skips slow ones."""
    if quick and entry.slow:
        return "it takes minutes to prepare, so --quick skips it; name it with --against"
    if "checkpoint" in entry.needs and not checkpoint:
        return "there is no checkpoint to load; give the one the bundle was exported from: --model SRC --refiner SRC"
    if "gpu" in entry.needs and not gpu:
        return "there is no NVIDIA GPU"
    if "cpu" in entry.needs and gpu:
        return "it is measured only on CPUs"
    if "peers" in entry.needs and peers() is None:
        return f"there is no {PEERS.parent.parent}; create it with: make peers"
    absent = [module for module in entry.modules if find_spec(module) is None]
    return f"{absent[0]} is not installed; pip install 'sdxl-trt[cpu,export]'" if absent else ""


def peers() -> Path | None:
    """Return the Python of the peers' environment, in this folder or in the checkout, or None."""
    return next((path for path in (PEERS.absolute(), _HERE / PEERS) if path.exists()), None)


def command(entry: Entry, spec: Path) -> list[str]:
    """Return the command line of a contestant's process."""
    python = str(peers() or PEERS) if "peers" in entry.needs else sys.executable
    return [python, "-m", "sdxl_trt.benchmarks.contestants", str(spec), entry.name]


def environment(threads: int) -> dict[str, str]:
    """Return the environment variables added for every contestant: the same thread count for all."""
    return dict.fromkeys(_THREADS, str(threads)) | {"TOKENIZERS_PARALLELISM": "false"}


def cores() -> int:
    """Return how many processors this process may use: every contestant's thread count."""
    if sys.platform == "win32":
        return os.cpu_count() or 1
    else:  # noqa: RET505 - the type checker reads the branches of a platform
        return len(os.sched_getaffinity(0))


def shown(command_line: Sequence[str]) -> tuple[str, ...]:
    """Return a command for the report, without local paths."""
    return ("python", *(Path(part).name if "/" in part or os.sep in part else part for part in command_line[1:]))
