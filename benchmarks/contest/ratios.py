"""Ratios of two contestants' times, robust against noise of the machine.

A round's ratio compares two runs made one after the other: whatever slows the machine for a minute slows both. The
figure is the median over rounds, which a few disturbed rounds do not change; its spread is the span of the middle
eight of ten rounds. Medians of as many rounds vary by less than half of that, so a rerun's median should lie in it.
(Quartiles would be too narrow: one rerun in ten would leave them by chance.)
"""

__all__ = ["agree", "ratio", "ratios"]

import statistics
from collections.abc import Iterable, Iterator, Sequence

from sdxl_trt.benchmarks.report import BenchReport, Measurement, Ratio


def ratio(ours: Measurement, theirs: Measurement) -> Ratio:
    """Return the ratio of two measurements of one task taken in the same rounds. Raises ValueError if they differ."""
    if len(ours.seconds) != len(theirs.seconds):
        raise ValueError(f"{len(ours.seconds)} rounds by {ours.contestant}, {len(theirs.seconds)} by"
                         f" {theirs.contestant}: they were not taken together")  # fmt: skip
    pairs = [one / other for one, other in zip(ours.seconds, theirs.seconds, strict=True)]
    deciles = statistics.quantiles(pairs, n=10, method="inclusive") if len(pairs) > 1 else pairs
    return Ratio(
        what=ours.what,
        contestant=ours.contestant,
        against=theirs.contestant,
        rounds=len(pairs),
        median=statistics.median(pairs),
        low=deciles[0],
        high=deciles[-1],
    )


def ratios(measurements: Iterable[Measurement], ours: str) -> Iterator[Ratio]:
    """Yield the ratio of `ours` to every other contestant for every task that both ran; sweeps are skipped."""
    compared = [one for one in measurements if not one.sweep]
    mine = {one.what: one for one in compared if one.contestant == ours}
    for other in compared:
        if other.contestant != ours and other.what in mine:
            yield ratio(mine[other.what], other)


def agree(first: BenchReport, second: BenchReport) -> Sequence[str]:
    """Return the ratios in which two reports of one machine disagree: neither median lies in the other's spread."""
    earlier = {(one.what, one.contestant, one.against): one for one in first.ratios}
    found = []
    for one in second.ratios:
        before = earlier.get((one.what, one.contestant, one.against))
        if before is None or one.low <= before.median <= one.high or before.low <= one.median <= before.high:
            continue
        found.append(f"{one.what}, {one.contestant} over {one.against}: {before.median:.3f} and {one.median:.3f}")
    return found
