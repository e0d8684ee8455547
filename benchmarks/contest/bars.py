"""trt-bench's bars: this project's time divided by a peer's, and the cost of a cold start."""

__all__ = ["bench_bars"]

from collections.abc import Iterator
from statistics import median

from sdxl_trt.benchmarks.contest.cold_start import OURS as OUR_START
from sdxl_trt.benchmarks.contest.cold_start import THEIRS as THEIR_START
from sdxl_trt.benchmarks.contest.ratios import ratio
from sdxl_trt.benchmarks.contest.roster import FAST, FASTEST, OURS, OURS_INT8
from sdxl_trt.benchmarks.measure import NOT_MEASURED, Bar
from sdxl_trt.benchmarks.report import BenchReport, ColdStart, Measurement

STEP, PICTURE = "base UNet step", "picture"
# Which of ours, task, peer, the highest ratio allowed, and the goal or None.
LIMITS = (
    (OURS, STEP, "eager", 0.55, 0.50),
    (OURS, STEP, "compile", 0.50, 0.45),
    (OURS, STEP, "openvino", 1.05, 1.00),
    (OURS, PICTURE, "optimum", 0.90, None),
    (OURS_INT8, STEP, OURS, 0.52, None),
    (OURS_INT8, PICTURE, OURS, 0.55, None),
    (OURS_INT8, PICTURE, "optimum", 0.52, None),
    (OURS_INT8, PICTURE, "eager-bf16", 0.50, None),
    (OURS_INT8, PICTURE, "openvino-bf16", 0.92, None),
    (FASTEST, PICTURE, "diffusers", 0.15, None),
)
COLD_LIMIT = 0.35
FAST_LIMIT = 0.50
PRESET_STEPS = 30
"""The steps of a run that a preset's bar is about: a preset replaces them, and few steps leave it none to skip."""


def bench_bars(report: BenchReport) -> tuple[Bar, ...]:
    """Return the bars of a CPU run with the measured figures; the contestants record why a figure is missing."""
    named = {one.name: one for one in report.contestants}
    found = [
        _against(report, ours, task, peer, limit, goal)
        for ours, task, peer, limit, goal in LIMITS
        if (peer in named or report.of(peer, task))
        and (ours == OURS or ours in named)
        and (ours != FASTEST or report.settings.steps == PRESET_STEPS)
    ]
    return (*found, *_fast(report), *_cold(report.cold_starts))


def _fast(report: BenchReport) -> Iterator[Bar]:
    """Compare the UNets' time in the median picture of `--fast` with that of the full run."""
    if FAST not in {one.name for one in report.contestants} or report.settings.steps != PRESET_STEPS:
        return
    what, bar = f"UNet time of a {PICTURE}, {FAST} over that of {OURS}", f"<= {FAST_LIMIT:.2f} times"
    ours, theirs = (_unets(report.of(name, PICTURE)) for name in (FAST, OURS))
    if not ours or not theirs:
        yield Bar(what, bar, NOT_MEASURED, None)
        return
    yield Bar(what, bar, f"{ours / theirs:.2f} times ({ours:.2f} of {theirs:.2f} s)", ours / theirs <= FAST_LIMIT)


def _unets(picture: Measurement | None) -> float:
    """Return the seconds of both UNets in the median picture; 0 if they were not measured."""
    return 0.0 if picture is None else sum(picture.stages.get(stage, 0.0) for stage in ("base", "refiner"))


def _against(report: BenchReport, subject: str, task: str, peer: str, limit: float, goal: float | None) -> Bar:
    what = f"{task} over that of {peer}" if subject == OURS else f"{task} of {subject} over that of {peer}"
    bar = f"<= {limit:g} times" + ("" if goal is None else f", goal {goal:g}")
    ours, theirs = report.of(subject, task), report.of(peer, task)
    if ours is None or theirs is None:
        return Bar(what, bar, NOT_MEASURED, None)
    found = ratio(ours, theirs)
    seconds = f"{_seconds(ours)} of {_seconds(theirs)}"
    value = f"{found.median:.2f} times, {found.low:.2f} to {found.high:.2f} ({seconds})"
    return Bar(what, bar, value, found.median <= limit)


def _cold(starts: tuple[ColdStart, ...]) -> Iterator[Bar]:
    by_name = {start.name: start for start in starts}
    if not starts:
        return
    ours, theirs = by_name.get(OUR_START), by_name.get(THEIR_START)
    bar = f"<= {COLD_LIMIT:g} times"
    what = "cold start of trt-generate over that of a diffusers script"
    if ours is None or theirs is None or not ours.seconds or not theirs.seconds:
        yield from (Bar(f"{what}: {figure}", bar, NOT_MEASURED, None) for figure in ("seconds", "peak RSS"))
        return
    pace = median(one / other for one, other in zip(ours.seconds, theirs.seconds, strict=True))
    memory = ours.peak_rss / theirs.peak_rss
    yield Bar(f"{what}: seconds", bar, f"{pace:.2f} times ({ours.median:.2f} of {theirs.median:.2f} s)",
              pace <= COLD_LIMIT)  # fmt: skip
    sizes = f"{ours.peak_rss / 1e6:.0f} of {theirs.peak_rss / 1e6:.0f} MB"
    yield Bar(f"{what}: peak RSS", bar, f"{memory:.2f} times ({sizes})", memory <= COLD_LIMIT)


def _seconds(one: Measurement) -> str:
    return f"{one.median:.2f} s" if one.median >= 1 else f"{one.median * 1e3:.0f} ms"
