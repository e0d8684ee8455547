"""The sweeps over size, batch and handoff; one point of each sweep is the run's own settings."""

__all__ = ["is_usual", "sweep_asks"]

from collections.abc import Iterator

from sdxl_trt.benchmarks.contestants import Ask, Spec

SIZES = (0.5, 0.75, 1.0)
"""Sides as fractions of the run's own, rounded down to a multiple that the UNets take."""
BATCHES = (1, 2, 4)
HANDOFFS = (0.25, 0.5, 0.75, 0.9)


def sweep_asks(spec: Spec, multiple: int) -> Iterator[tuple[str, Ask]]:
    """Yield the name of a sweep and a question for each of its points; without a refiner there is no handoff sweep.

    Sides are multiples of `multiple` pixels.
    """
    for share in SIZES:
        width, height = (max(multiple, int(side * share) // multiple * multiple) for side in (spec.width, spec.height))
        yield "size", Ask(do="run", task="picture", width=width, height=height)
    for batch in BATCHES:
        yield "batch", Ask(do="run", task="picture", batch=batch)
    if spec.handoff is not None:
        for handoff in sorted({*HANDOFFS, spec.handoff}):
            yield "handoff", Ask(do="run", task="picture", handoff=handoff)
        yield "handoff", Ask(do="run", task="picture", handoff="none")


def is_usual(ask: Ask, spec: Spec) -> bool:
    """Return whether a question has the same settings as `spec`."""
    sizes = ((ask.width, spec.width), (ask.height, spec.height), (ask.batch, spec.batch))
    return ask.handoff in ("spec", spec.handoff) and all(asked in (None, usual) for asked, usual in sizes)
