"""The peak rate is the best rate measured, in processes with the requested threads."""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sdxl_trt.benchmarks.roofline import gemm
from sdxl_trt.benchmarks.roofline.gemm import GemmRate, floor_seconds, main, measure_gemm, peak_gemm_rate
from sdxl_trt.engines.errors import EngineError, UsageError


@pytest.mark.parametrize("library", ["numpy", "onnxruntime"])
def test_a_rate_is_of_one_library_and_size(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_SECONDS", 0.001)
    rates = gemm._measure(library, 1, [32])
    assert [(each.library, each.size, each.threads) for each in rates] == [(library, 32, 1)]
    assert 1e6 < rates[0].rate < 1e13


def test_a_rate_is_the_products_flops_over_the_shortest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_fastest", lambda product: 0.25)
    assert gemm._measure("numpy", 3, [10]) == [GemmRate(library="numpy", size=10, threads=3, rate=8000.0)]


@pytest.mark.parametrize("make", [gemm._numpy, gemm._onnxruntime])
def test_the_timed_function_computes_the_product(make: Callable[[int, int], gemm.Product]) -> None:
    left, right = gemm._factors(16)
    made: Any = make(16, 1)()
    assert np.allclose(made.numpy() if hasattr(made, "numpy") else made, left @ right, atol=1e-4)


def test_the_timed_product_of_bytes_is_exact() -> None:
    left, right = gemm._eight_bits(16)
    made: Any = gemm._onnxruntime_int8(16, 1)()
    np.testing.assert_array_equal(made.numpy(), (left.astype(np.int32) - 128) @ right)


def test_a_library_is_measured_in_the_precisions_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_SECONDS", 0.001)
    rates = gemm._measure("onnxruntime", 1, [32], ("fp32", "bf16", "int8"))
    assert [each.precision for each in rates] == ["fp32", "int8"]
    assert [each.precision for each in gemm._measure("numpy", 1, [32], ("bf16", "int8"))] == []


def test_the_fastest_call_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.4, 1.0, 1.1, 2.0, 2.3])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert gemm._fastest(lambda: None) == pytest.approx(0.1)


def test_the_peak_is_the_best_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = [GemmRate(library="numpy", size=8, threads=2, rate=rate) for rate in (3e9, 7e9, 5e9)]
    monkeypatch.setattr(gemm, "measure_gemm", lambda threads: rates)
    assert peak_gemm_rate(2) == 7e9
    assert floor_seconds(14e9, 7e9) == 2.0


def test_threads_are_set_before_a_library_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "LIBRARIES", ("numpy", "absent_library"))
    monkeypatch.setitem(os.environ, "OPENBLAS_NUM_THREADS", "64")
    found = measure_gemm(1, [32])
    assert [(each.library, each.threads) for each in found] == [("numpy", 1)]


def test_failures_to_measure_are_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--threads 0"):
        measure_gemm(0)
    monkeypatch.setattr(gemm, "LIBRARIES", ())
    with pytest.raises(EngineError, match="none installed"):
        measure_gemm(1)
    assert main(["--threads", "1"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
