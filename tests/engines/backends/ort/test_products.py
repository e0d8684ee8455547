"""Whether the machine's 8-bit products are exact is found by computing some."""

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from sdxl_trt.engines.backends.ort import products

EXACT = 255 * 127 * 64


def _onnxruntime(result: int, seen: list[bytes]) -> Any:
    """Return a module whose sessions return `result`, and keep their graphs."""

    def session(graph: bytes, *_: Any, **__: Any) -> Any:
        seen.append(graph)
        return SimpleNamespace(run=lambda names, feed: [np.full((16, 16), result, np.int32)])

    module = ModuleType("onnxruntime")
    module.__dict__.update(SessionOptions=SimpleNamespace, InferenceSession=session)
    return module


@pytest.mark.parametrize(("result", "saturated"), [(EXACT, False), (32767 * 32, True), (EXACT - 1, True)])
def test_a_product_that_is_not_exact_saturates(result: int, saturated: bool) -> None:
    assert products.saturates(_onnxruntime(result, [])) is saturated


def test_the_probe_is_a_valid_graph_with_the_exact_product() -> None:
    seen: list[bytes] = []
    products.saturates(_onnxruntime(EXACT, seen))
    model = onnx.load_model_from_string(seen[0])
    onnx.checker.check_model(model, full_check=True)
    (found,) = ReferenceEvaluator(model).run(None, {"a": np.full((16, 64), 255, np.uint8)})
    assert (found == EXACT).all()


def test_this_machine_saturates_only_without_instructions_for_8_bit_products() -> None:
    flags = Path("/proc/cpuinfo")
    words = set(flags.read_text().split()) if flags.is_file() else set[str]()
    if not words & {"avx2", "avx512bw"}:
        pytest.skip("not an x86 processor whose features Linux tells")
    exact = words & {"avx512_vnni", "avx_vnni", "amx_int8"}
    assert products.saturates(onnxruntime) is not bool(exact)
