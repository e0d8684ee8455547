"""Jobs that run a stage together, until the runtime shares calls between requests."""

__all__ = ["Shared", "share_key"]

from collections.abc import Hashable, Iterator, Sequence

from sdxl_trt.engines import CorruptError
from sdxl_trt.runtime import Pipeline, Step
from sdxl_trt.runtime.pipeline import Job, timed
from sdxl_trt.runtime.request import ResolvedRequest, StageName


def share_key(request: ResolvedRequest, stage: StageName) -> Hashable | None:  # noqa: ARG001 - the runtime's own reads it
    """Return what must be equal for requests to share the calls of a stage's UNet; None if this one runs alone."""
    return None


class Shared:
    """One stage of several jobs, one after the other."""

    def __init__(self, pipeline: Pipeline, stage: StageName, jobs: Sequence[Job], *, rows: int | None = None) -> None:
        self.failed: dict[int, Exception] = {}
        self._pipeline, self._stage, self._jobs, self._rows = pipeline, stage, jobs, rows
        self._dropped: set[int] = set()

    def drop(self, number: int) -> None:
        """Leave out job `number` from now on."""
        self._dropped.add(number)

    def steps(self) -> Iterator[tuple[int, Step]]:
        """Return an iterator of the units of work, each with the index of its job."""
        run = self._pipeline.base if self._stage == "base" else self._pipeline.refine
        for number, job in enumerate(self._jobs):
            try:
                for step in timed(job.run, run(job)):
                    if number in self._dropped:
                        break
                    yield number, step
            except CorruptError as exc:
                self.failed[number] = exc
