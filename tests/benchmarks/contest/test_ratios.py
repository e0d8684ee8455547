"""Ratios by round: a slower machine does not change them, and a rerun is compared with the spread."""

import numpy as np
import pytest

from sdxl_trt.benchmarks.contest.ratios import agree, ratio, ratios
from sdxl_trt.benchmarks.report.records import BenchReport, BenchSettings, Measurement, Ratio

SETTINGS = BenchSettings(bundle="", model="", width=8, height=8, batch=1, steps=1, handoff=None, guidance=1, seed=0,
                    tokens=77, runs=1, warmups=1, threads=1, prompt="")  # fmt: skip


def _of(contestant: str, *seconds: float, what: str = "picture", sweep: str = "") -> Measurement:
    return Measurement(contestant=contestant, what=what, width=8, height=8, batch=1, seconds=seconds, sweep=sweep)


def test_a_slowing_machine_does_not_change_the_ratio() -> None:
    drift = np.linspace(1, 9, 11)
    found = ratio(_of("a", *drift), _of("b", *2 * drift))
    assert (found.median, found.low, found.high) == (0.5, 0.5, 0.5)
    assert found.rounds == 11


def test_a_disturbed_round_does_not_change_the_ratio() -> None:
    found = ratio(_of("a", 1, 50, *[1] * 10), _of("b", *[2] * 12))
    assert (found.median, found.low, found.high) == (0.5, 0.5, 0.5)


def test_the_spread_equals_numpys_deciles() -> None:
    seconds = np.random.default_rng(0).uniform(1, 2, (2, 14))
    found = ratio(_of("a", *seconds[0]), _of("b", *seconds[1]))
    expected = np.quantile(seconds[0] / seconds[1], [0.1, 0.5, 0.9])
    np.testing.assert_allclose([found.low, found.median, found.high], expected)


def test_one_round_has_no_spread() -> None:
    found = ratio(_of("a", 3), _of("b", 2))
    assert (found.low, found.median, found.high) == (1.5, 1.5, 1.5)


def test_different_numbers_of_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rounds by a, 1 by b"):
        ratio(_of("a", 1, 2), _of("b", 1))


def test_ratios_cover_all_common_tasks_but_no_sweeps() -> None:
    taken = [_of("a", 1), _of("b", 2), _of("c", 4), _of("a", 9, sweep="size"), _of("b", 1, what="handoff")]
    found = {(one.what, one.against): one.median for one in ratios(taken, "a")}
    assert found == {("picture", "b"): 0.5, ("picture", "c"): 0.25}


def _report(low: float, median: float, high: float) -> BenchReport:
    one = Ratio(what="picture", contestant="a", against="b", rounds=3, low=low, median=median, high=high)
    return BenchReport(machine={}, versions={}, settings=SETTINGS, ratios=(one,))


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ((0.4, 0.5, 0.6), (0.5, 0.59, 0.62), 0),
        ((0.5, 0.5, 0.5), (0.4, 0.52, 0.6), 0),
        ((0.49, 0.5, 0.51), (0.59, 0.6, 0.61), 1),
        ((0.4, 0.5, 0.6), (0.6, 0.7, 0.8), 1),
    ],
)
def test_a_rerun_agrees_within_the_spread(first: tuple[float, ...], second: tuple[float, ...], found: int) -> None:
    assert len(agree(_report(*first), _report(*second))) == found


def test_reruns_on_a_noisy_virtual_machine_agree() -> None:
    """Two runs of twelve rounds agree although the machine drifts by half and every run has 10 % noise."""
    random = np.random.default_rng(1)
    disagreed = 0
    for _ in range(200):
        reports = []
        for _ in range(2):
            slow = 1 + 0.5 * np.sin(random.uniform(0, 6) + np.linspace(0, 4, 12))
            noise = random.lognormal(0, 0.1, (2, 12))
            one = ratio(_of("a", *(0.5 * slow * noise[0])), _of("b", *(slow * noise[1])))
            reports.append(BenchReport(machine={}, versions={}, settings=SETTINGS, ratios=(one,)))
        disagreed += bool(agree(*reports))
    assert disagreed <= 2
