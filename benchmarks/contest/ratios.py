"""How many times as long as another a contestant took, in a form that a noisy machine cannot talk out of.

Each round's ratio is of two runs that were neighbours in time: what slows the machine for a minute slows both. The
median of the rounds is the figure, which a few disturbed rounds do not move, and its spread is the span of the middle
eight of ten rounds. Medians of as many rounds vary by less than half of that, so another run's is to lie in it.
(Quartiles would be too narrow: one rerun in ten would leave them by chance.)
"""

__all__ = ["agree", "ratio", "ratios"]

import statistics
from collections.abc import Iterable, Iterator, Sequence

from sdxl_trt.benchmarks.report import BenchReport, Measurement, Ratio


def ratio(ours: Measurement, theirs: Measurement) -> Ratio:
    """Return the ratio of two measurements of one task whose runs were taken in the same rounds."""
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
    """Yield the ratio of `ours` to every other contestant in every task that both did, sweeps left out."""
    compared = [one for one in measurements if not one.sweep]
    mine = {one.what: one for one in compared if one.contestant == ours}
    for other in compared:
        if other.contestant != ours and other.what in mine:
            yield ratio(mine[other.what], other)


def agree(first: BenchReport, second: BenchReport) -> Sequence[str]:
    """Return in which ratios two reports of one machine do not agree: neither median within the other's spread."""
    earlier = {(one.what, one.contestant, one.against): one for one in first.ratios}
    found = []
    for one in second.ratios:
        before = earlier.get((one.what, one.contestant, one.against))
        if before is None or one.low <= before.median <= one.high or before.low <= one.median <= before.high:
            continue
        found.append(f"{one.what}, {one.contestant} over {one.against}: {before.median:.3f} and {one.median:.3f}")
    return found
