"""The host-time benchmark: its cases, its clock without the UNet and the noise, and its report."""

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from sdxl_trt.benchmarks.host_time import __main__ as host_time
from sdxl_trt.benchmarks.host_time import cases as host_cases
from sdxl_trt.benchmarks.host_time.__main__ import Report, Row, Spread, bars, main, table
from sdxl_trt.benchmarks.host_time.cases import CASES, ELSEWHERE, Lap, our_run, their_run
from sdxl_trt.runtime.diffusion.samplers.registry import TWO_CALLS, sampler_names

# diffusers' own warnings: it passes torch tensors to np.array; KDPM2 takes the logarithm of sigma 0.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]
STEPS = 4


def _row(ours: float, theirs: float) -> Row:
    each = Spread(theirs, theirs, theirs)
    nothing = Spread(0.0, 0.0, 0.0)
    return Row("euler", "EulerDiscreteScheduler", "float32", "0.42.1", Spread(ours, ours, ours), each, each, nothing,
               nothing)  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_cases, "SIDE", 64)
    monkeypatch.setattr(host_time, "HEAP", 1)


def test_every_sampler_is_compared_or_has_a_reason() -> None:
    assert {case.sampler for case in CASES} | set(ELSEWHERE) == set(sampler_names())


@pytest.mark.parametrize("case", [case for case in CASES if not case.needs], ids=lambda case: case.sampler)
def test_both_sides_take_the_same_steps(case: host_cases.HostCase) -> None:
    """Samplers with two UNet calls per step leave out the last step, which has one call."""
    expected = STEPS - (case.sampler in TWO_CALLS)
    for run in (our_run(case.sampler, "float32", STEPS), their_run(case, "float16", STEPS)):
        laps = run()
        assert len(laps) == expected
        assert all(lap.host > 0 for lap in laps)
        stochastic = case.sampler in {"euler_ancestral", "dpm_2_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "lcm"}
        assert (laps[0].noise > 0) is stochastic


def test_time_of_the_unet_and_the_noise_is_not_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake clock that only the calls advance."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    watch = host_cases._Watch()

    def takes(seconds: float) -> None:
        clock[0] += seconds

    def work() -> Iterator[str]:
        for _ in range(2):
            watch.aside("unet", takes)(8.0)
            watch.aside("noise", takes)(2.0)
            takes(0.5)
            yield "a step"

    assert watch.laps(work()) == [Lap(0.5, 2.0)] * 2


@pytest.mark.parametrize(("ours", "met"), [(50.0, True), (51.0, False)])
def test_the_bar_is_half_of_diffusers(ours: float, met: bool) -> None:
    row = _row(ours, 100.0)
    wide, half = bars([row, msgspec.structs.replace(row, precision="float16")])
    assert (wide.what, wide.bar, wide.met) == ("euler, float32", "<= 0.5", met)
    assert (half.what, half.bar, half.met) == ("euler, float16", "none", None)


def test_a_tiny_run_writes_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdxl_trt.benchmarks.host_time.__main__.find_spec", lambda name: None)
    results = tmp_path / "host_time.json"
    code = main(["--only", "euler", "--only", "lms", "--rounds", "1", "--steps", "2", "--results", str(results)])
    report = msgspec.json.decode(results.read_bytes(), type=Report)
    assert code in (0, 1)
    assert [(row.sampler, row.precision) for row in report.rows] == [("euler", "float32"), ("euler", "float16")]
    assert report.missing == {"lms": "LMSDiscreteScheduler needs scipy: --peers"}
    assert len(report.bars) == 2
    assert all(row.ours.low <= row.ours.median <= row.ours.high for row in report.rows)
    assert results.with_suffix(".md").read_text(encoding="utf-8") == table(report) == capsys.readouterr().out
