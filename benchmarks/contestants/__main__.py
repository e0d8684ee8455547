"""The process of one contestant: ``python -m sdxl_trt.benchmarks.contestants SPEC.json NAME``, questions on stdin."""

__all__ = ["main", "make"]

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sdxl_trt.benchmarks.contestants.protocol import Contestant, Spec, serve


def make(spec: Spec) -> Contestant:
    """Return the contestant that `spec` names; it imports its libraries in `ready`."""
    if spec.name.startswith("sdxl-trt") or spec.name in ("ort-cuda", "ort-tensorrt", "tensorrt"):
        from sdxl_trt.benchmarks.contestants.ours import Ours  # noqa: PLC0415 - each in its own environment

        return Ours(spec)
    if spec.name == "onnxruntime":
        from sdxl_trt.benchmarks.contestants.plain_onnxruntime import PlainOnnxRuntime  # noqa: PLC0415

        return PlainOnnxRuntime(spec)
    if spec.name.startswith("openvino"):
        from sdxl_trt.benchmarks.contestants.openvino_cpu import OpenVino  # noqa: PLC0415

        return OpenVino(spec)
    if spec.name == "optimum":
        from sdxl_trt.benchmarks.contestants.optimum_onnx import Optimum  # noqa: PLC0415

        return Optimum(spec)
    from sdxl_trt.benchmarks.contestants.pytorch import Torch  # noqa: PLC0415

    return Torch(spec)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stdin ends or asks to quit. Libraries' prints to stdout go to stderr: stdout is the protocol's."""
    path, name = sys.argv[1:] if argv is None else argv
    spec = msgspec.json.decode(Path(path).read_bytes(), type=Spec)
    spec = msgspec.structs.replace(spec, name=name)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with answers:
        serve(lambda: make(spec), sys.stdin.buffer, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
