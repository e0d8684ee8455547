"""The library OpenVINO, and the precision that its CPU plugin computes in on this machine."""

__all__ = [
    "COMPUTE_PRECISIONS",
    "ComputePrecision",
    "compile_settings",
    "exact_products",
    "openvino_core",
    "settled_precision",
]

from functools import cache
from typing import Any, Literal, get_args

import numpy as np

from sdxl_trt.engines.errors import IncompatibleError, UsageError
from sdxl_trt.engines.host import one_line

DEVICE = "CPU"
ComputePrecision = Literal["fp32", "bf16"]
COMPUTE_PRECISIONS: tuple[ComputePrecision, ...] = get_args(ComputePrecision)
_HINTS: dict[ComputePrecision, str] = {"fp32": "f32", "bf16": "bf16"}


@cache
def openvino_core() -> Any:
    """Return OpenVINO's Core, one a process: its plugins are loaded once. Raises IncompatibleError if it is missing."""
    try:
        import openvino  # noqa: PLC0415 - 0.15 s, and only when an engine is loaded
    except Exception as exc:
        # A library that it misses, or a processor that it does not run on, is an ImportError or a RuntimeError.
        raise IncompatibleError(f"provider openvino needs the package openvino ({one_line(str(exc))[:200]});"
                                " pip install 'sdxl-trt[openvino]'") from exc  # fmt: skip
    core = openvino.Core()
    if DEVICE not in core.available_devices:
        raise IncompatibleError("provider openvino: OpenVINO finds no plugin for CPUs in its package; pip install"
                                " --force-reinstall 'sdxl-trt[openvino]'")  # fmt: skip
    return core


def settled_precision(asked: str) -> ComputePrecision:
    """Return what OpenVINO computes in: `asked`, or for "auto" bf16 where this CPU has instructions for it, else fp32.

    Raises UsageError for another name, IncompatibleError for bf16 on a CPU without it or if OpenVINO is missing.
    """
    if asked not in ("auto", *COMPUTE_PRECISIONS):
        raise UsageError(f"unknown compute precision {asked!r}; choose auto, {' or '.join(COMPUTE_PRECISIONS)}")
    if asked == "fp32":
        return "fp32"
    has_it = "BF16" in openvino_core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    if asked == "bf16" and not has_it:
        raise IncompatibleError("this CPU does not compute in bf16; leave --compute-precision out, or give fp32")
    return "bf16" if has_it else "fp32"


def compile_settings(precision: ComputePrecision) -> dict[str, str]:
    """Return OpenVINO's settings: one request at a time, products and convolutions in `precision`."""
    return {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        # Activations of layers whose weights alone are in 8 bits stay floating-point numbers.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    }


@cache
def exact_products() -> bool:
    """Return whether OpenVINO's 8-bit products are exact on this processor: one small product tells.

    Without VNNI instructions, pairs of products may be added in 16 bits, which saturate without a word.
    """
    from openvino import Model, opset13  # noqa: PLC0415

    rows, inner, low, high = 16, 64, np.float32(-128), np.float32(127)
    given = opset13.parameter([rows, inner], np.float32, name="given")
    narrow = opset13.fake_quantize(given, low, high, low, high, 256)
    stored = opset13.convert(opset13.constant(np.full((inner, rows), 127, np.int8)), "f32")
    product = opset13.matmul(narrow, opset13.multiply(stored, np.float32(1)), transpose_a=False, transpose_b=False)
    model = Model([product], [given], "products")
    request = openvino_core().compile_model(model, DEVICE, compile_settings("fp32")).create_infer_request()
    found = [request.infer({"given": np.full((rows, inner), each)}) for each in (low, high)]
    return all(bool((next(iter(one.values())) == each * 127 * inner).all())
               for one, each in zip(found, (low, high), strict=True))  # fmt: skip
