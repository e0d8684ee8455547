"""What the worker does with a pipeline: each of the scheduler's actions, for pieces."""

__all__ = ["Studio"]

import math
from collections.abc import Iterator, Sequence

import numpy as np

from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.engines.adapters import Use
from sdxl_trt.engines.bundle import read_bundle
from sdxl_trt.runtime import Pipeline, Request, Step
from sdxl_trt.runtime.pipeline import Job, Shared, timed
from sdxl_trt.runtime.request import StageName
from sdxl_trt.server.desk.pieces import Piece
from sdxl_trt.server.desk.plan import Predictor, Times

PROBE_SIDE, PROBE_STEPS = 64, 4


class Studio:
    """One pipeline, and how it is used. With `fixed`, every shared call has the same number of rows."""

    def __init__(self, pipeline: Pipeline, predictor: Predictor, *, fixed: bool = False) -> None:
        self.pipeline = pipeline
        self._predictor = predictor
        self._fixed = fixed

    @property
    def pictures(self) -> int:
        """Return how many pictures share a call of a UNet."""
        return self.pipeline.pictures_at_once

    def times(self) -> Times:
        """Return what changes of engines cost now."""
        if self._stays():
            return Times()
        return Times(self._predictor.swap(), decoder_stays=self.pipeline.pool.residency == "resident")

    def _stays(self) -> bool:
        """Return whether the UNets stay loaded beside each other."""
        pool, stages = self.pipeline.pool, self.pipeline.manifest.stages().values()
        return len(stages) == 1 or (pool.residency == "resident" and all(pool.holds(stage.unet) for stage in stages))

    def encode(self, pieces: Sequence[Piece]) -> Iterator[Step]:
        """Start the pieces' jobs, and encode all their pictures and prompts."""
        for piece in pieces:
            assert piece.request is not None  # noqa: S101 - graphs are not encoded here
            piece.job = self.pipeline.start(piece.request)
        jobs = [_job(piece) for piece in pieces]
        self.pipeline.expect(jobs)
        yield from timed(jobs[0].run, self.pipeline.pictures(jobs))
        yield from timed(jobs[0].run, self.pipeline.encode(jobs))

    def denoise(self, stage: StageName, pieces: Sequence[Piece]) -> Shared:
        """Return the steps of `stage` for pieces that share calls."""
        rows = 2 * self.pictures if self._fixed else None
        return Shared(self.pipeline, stage, [_job(piece) for piece in pieces], rows=rows)

    def decode(self, piece: Piece, *, early: bool) -> Iterator[Step]:
        """Decode a piece: its estimate if it was stopped `early`."""
        job = _job(piece)
        if early and piece.estimate is not None:
            job.latents = piece.estimate / np.float32(job.run.request.final_scale)
        return timed(job.run, self.pipeline.decode(job))

    def home(self) -> None:
        """Load what the next request needs first, while nothing else is to be done."""
        stage, pool = self.pipeline.manifest.base, self.pipeline.pool
        encoders: list[Use] = [encoder.component for encoder in stage.text_encoders]
        if all(pool.holds(encoder) for encoder in encoders):
            pool.phase(stage.unet)
        else:
            pool.phase(*encoders, next_engines=(stage.unet,))

    def probe(self) -> None:
        """Draw a small picture with every expert; it fails as a request would, and teaches what steps take."""
        seconds: dict[str, float] = {}
        run = None
        for step in self.pipeline.steps(self._probe()):
            run = self.pipeline.run
            if step.stage == "load":
                continue
            seconds[step.stage] = step.seconds  # the last: the first calls of an engine are slow
        if run is not None:
            pixels = run.request.height * run.request.width
            for stage in ("base", "refiner", "decode"):
                if stage in seconds:
                    self._predictor.observe(stage, pixels, seconds[stage])

    def _probe(self) -> Request:
        manifest = self.pipeline.manifest
        if self.pipeline.pool.limits is not None:
            return Request("", steps=PROBE_STEPS, seed=0)
        multiple = math.lcm(*(stage.size_multiple for stage in manifest.stages().values()))
        side = math.ceil(PROBE_SIDE / multiple) * multiple
        return Request("", steps=PROBE_STEPS, seed=0, width=side, height=side)

    def is_stored(self) -> bool:
        """Return whether the bundle's folder still holds what was opened, so that engines can be loaded again."""
        bundle = self.pipeline.pool.bundle
        try:
            return read_bundle(bundle.root).manifest == bundle.manifest
        except SdxlTrtError:
            return False

    def free(self) -> None:
        """Unload every engine."""
        self.pipeline.pool.free()

    def close(self) -> None:
        """Unload every engine and close the device; the studio cannot be used afterwards."""
        self.pipeline.pool.close()


def _job(piece: Piece) -> Job:
    assert piece.job is not None  # noqa: S101 - it was encoded
    return piece.job
