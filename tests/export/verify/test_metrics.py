"""The figures against plain numpy, and which errors the limits catch."""

import numpy as np
import pytest

from sdxl_trt.export.verify.metrics import EXCESS, excess, limits_of, measure


def test_figures_of_a_known_error(rng: np.random.Generator) -> None:
    reference = rng.uniform(-1, 3, (2, 4, 8, 8))
    reference.flat[0], reference.flat[1] = -1, 3
    error = np.where(rng.random(reference.shape) < 0.5, 1e-3, -1e-3)
    found = reference + error
    figures = measure("sample", found, reference)
    assert figures.peak == 4
    assert figures.max_abs == pytest.approx(1e-3, rel=1e-9)
    assert figures.psnr == pytest.approx(20 * np.log10(4 / 1e-3), abs=1e-6)
    product = np.vdot(found, reference) / np.linalg.norm(found) / np.linalg.norm(reference)
    assert figures.cosine == pytest.approx(product, abs=1e-12)


def test_equal_arrays_have_no_psnr_and_pass() -> None:
    for array in (np.arange(6.0), np.zeros(3), np.full(3, 7.0)):
        figures = measure("x", array, array)
        assert (figures.psnr, figures.max_abs) == (None, 0)
        assert limits_of("fp32", "graph").problem(figures) == ""


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_fail_and_rank_lowest(value: float) -> None:
    broken = measure("x", np.array([1.0, value]), np.array([1.0, 2.0]))
    assert limits_of("bf16", "precision").problem(broken) == "NaN or infinity"
    assert broken.rank < measure("x", np.array([9.0, -9.0]), np.array([1.0, 2.0])).rank


@pytest.mark.parametrize(
    ("wrong", "word"),
    [("one element", "largest error"), ("scale", "largest error"), ("everywhere a little", "PSNR")],
)
def test_each_limit_catches_what_the_others_miss(wrong: str, word: str, rng: np.random.Generator) -> None:
    reference = rng.standard_normal(100_000)
    found = reference.copy()
    if wrong == "one element":
        found[3] += 0.01
    elif wrong == "scale":
        found *= 1.001
    else:
        found += np.ptp(reference) * 1.2e-5 * np.sign(rng.standard_normal(reference.shape))
    assert word in limits_of("fp32", "graph").problem(measure("x", found, reference))


def test_excess_distinguishes_rounding_from_other_errors(rng: np.random.Generator) -> None:
    exact = rng.standard_normal(10_000)
    rounded, other = (exact.astype(np.float32) * (1 + 2**-11 * rng.uniform(-1, 1, exact.shape)) for _ in range(2))
    assert excess(other, rounded, exact) < 1.1
    assert excess(other + 2**-10, rounded, exact) > EXCESS
    assert excess(exact, exact, exact) == 0


def test_mixed_has_the_limits_of_fp16() -> None:
    assert limits_of("mixed", "graph") == limits_of("fp16", "graph")
