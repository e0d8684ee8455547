"""One device of a pool: a desk that does its part of an order, and hands over what it leaves.

Everything that a desk does holds here too: requests share calls of a UNet, what fails in company runs again alone, and
orders are stopped between two calls.
"""

__all__ = ["Pool", "PoolName"]

import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.engines.adapters import Use
from sdxl_trt.engines.bundle import Stage
from sdxl_trt.runtime import Pipeline, Request, Step
from sdxl_trt.runtime.pipeline import Job, Shared, timed
from sdxl_trt.runtime.request import ResolvedRequest, StageName
from sdxl_trt.runtime.text import PromptEmbeds
from sdxl_trt.server.desk import Desk, Ended, Event, Graph, Piece, Runner, Shift, Studio, Ticket
from sdxl_trt.server.desk.plan import Policy, Predictor, Scheduler, Times
from sdxl_trt.server.options import Options
from sdxl_trt.server.ray.errands import Errand, Handover, Over, Refused
from sdxl_trt.server.refusals import RefusedError

PoolName = Literal["both", "base", "refiner"]
_UNITS = {"base": ("encode", "base", "base_shallow"), "refiner": ("refiner", "refiner_shallow", "decode")}
"""The units of work of the pool of an expert."""
UNBOUNDED = 1 << 20
"""The ingress bounds what waits; a pool takes what it is sent."""
DAY = 86400.0
TOKENS = 77

log = logging.getLogger("sdxl_trt.server")


class Pool:
    """A device that draws for an ingress. Made on the event loop on which it is used; `start` before anything else."""

    def __init__(self, name: PoolName, options: Options, opener: Callable[[Options], Pipeline], runner: Runner) -> None:
        self.name: PoolName = name
        self._options = replace(options, queue=UNBOUNDED, queue_pictures=UNBOUNDED, deadline=DAY, rate_requests=None,
                                rate_seconds=None)  # fmt: skip
        self._opener, self._runner = opener, runner
        self._pipeline: Pipeline | None = None
        self._desk: _PoolDesk | None = None

    async def start(self) -> None:
        """Open the bundle, and draw a picture to see that it works. Raises SdxlTrtError."""
        self._pipeline = self._opener(self._options)
        self._desk = _PoolDesk(self._pipeline, self._options, self.name)
        self._desk.runner = self._runner
        ready = await self._desk.warm()
        if not ready:
            self.close()
            raise SdxlTrtError(f"the pool {self.name} cannot draw: {ready.reason}")

    def check(self) -> None:
        """Raise SdxlTrtError if this device should be given up: its engines fail, or a call of one does not return."""
        if self._desk is None or not self._desk.ready:
            raise SdxlTrtError("no engine is loaded" if self._desk is None else self._desk.ready.reason)

    async def draw(self, errand: Errand) -> AsyncIterator[Event | Over | Refused]:
        """Do an errand; yield its events, and in the end `Over`. Left before that, it is cancelled at its next step."""
        assert self._desk is not None  # noqa: S101 - it was started
        folder = None
        try:
            if isinstance(errand.work, Graph):
                folder, errand = _unpacked(errand, self._options)
            async for event in _told(self._desk, errand):
                yield event
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """End what is drawn, and unload the engines."""
        if self._desk is not None:
            self._desk.close()
        if self._pipeline is not None:
            self._pipeline.pool.close()


async def _told(desk: "_PoolDesk", errand: Errand) -> AsyncIterator[Event | Over | Refused]:
    try:
        ticket = await desk.submit(errand)
    except RefusedError as exc:
        yield Refused(str(exc))
        return
    except SdxlTrtError as exc:
        yield Over(Ended("failed", exc))
        return
    try:
        async for event in ticket.events():
            yield desk.over(ticket, event) if isinstance(event, Ended) else event
    finally:
        ticket.cancel()
        desk.left.pop(errand.id, None)


def _unpacked(errand: Errand, options: Options) -> tuple[Path, Errand]:
    """Write the pictures of a graph to a folder of its own; return it, and the errand with these files."""
    folder = Path(tempfile.mkdtemp(prefix="sdxl-trt-graph-"))
    paths = {}
    for number, (name, data) in enumerate(errand.files.items()):
        paths[name] = folder / str(number)
        paths[name].write_bytes(data)
    changes: dict[str, Any] = {"folder": folder}
    # A graph may name its pictures, and what the server's options are; those of this machine count.
    known = {"pictures": paths, "options": options}
    changes |= {name: value for name, value in known.items() if hasattr(errand.work, name)}
    assert is_dataclass(errand.work)  # noqa: S101 - a Graph
    return folder, replace(errand, work=replace(errand.work, **changes))


class _PoolDesk(Desk):
    """A desk whose orders are errands."""

    def __init__(self, pipeline: Pipeline, options: Options, name: PoolName) -> None:
        self._name: PoolName = name
        self.left: dict[str, Handover] = {}
        """What the base left of each errand, by its id, until it is sent."""
        super().__init__(pipeline, options, owned=True)

    def _shift(self, pipeline: Pipeline, *, owned: bool) -> Shift:
        studio = _PoolStudio(pipeline, self.predictor, self._name, self.left, fixed=self.options.fixed_batch)
        return Shift(studio, Scheduler(Policy(pictures=studio.pictures)), owned=owned)

    def _pieces(self, ticket: Ticket, resolved: ResolvedRequest | None, deadline: float) -> list[Piece]:
        pieces = super()._pieces(ticket, resolved, deadline)
        for piece in pieces:
            part, task = _errand(piece).part, piece.task
            if part == "base":
                cost = replace(task.cost, refiner=0.0, decode=0.0)
                piece.task = replace(task, refiner_key=None, cost=cost)
            elif part == "refiner":
                piece.task = replace(task, base_key=None, cost=replace(task.cost, encode=0.0, base=0.0))
            elif part == "decode":
                cost = replace(task.cost, encode=0.0, base=0.0, refiner=0.0)
                piece.task = replace(task, base_key=object(), refiner_key=None, cost=cost)
        return pieces

    def over(self, ticket: Ticket, ended: Ended) -> Over:
        """Return the end of an errand."""
        request = ticket.order.work
        known = {}
        if isinstance(request, Request) and request.width and request.height:
            pixels = request.width * request.height
            held = _UNITS["base"] + _UNITS["refiner"] if self._name == "both" else _UNITS[self._name]
            known = {stage: self.predictor.unit(stage, pixels) for stage in held}
        return Over(ended, self.left.pop(ticket.order.id, None), known)


class _PoolStudio(Studio):
    """What a pool's worker does: as a studio, but a base leaves its latents, and a refiner begins with them."""

    def __init__(
        self, pipeline: Pipeline, predictor: Predictor, name: PoolName, left: dict[str, Handover], *, fixed: bool
    ) -> None:
        super().__init__(pipeline, predictor, fixed=fixed)
        self._name: PoolName = name
        self._left = left

    def times(self) -> Times:
        """Return what changes of engines cost: a pool of one expert changes none."""
        return super().times() if self._name == "both" else Times()

    def encode(self, pieces: Sequence[Piece]) -> Iterator[Step]:
        """Start the pieces' jobs; encode those that nobody has begun with."""
        if self._name == "both" and all(_errand(piece).part == "all" for piece in pieces):
            yield from super().encode(pieces)
            return
        new = []
        for piece in pieces:
            assert piece.request is not None  # noqa: S101 - graphs are not encoded here
            piece.job = self.pipeline.start(piece.request)
            errand = _errand(piece)
            if errand.handover is not None:
                errand.handover.give(piece.job)
            elif errand.estimate is not None:
                piece.estimate = errand.estimate.copy()
            else:
                new.append(piece.job)
        if new:
            yield from timed(new[0].run, self.pipeline.pictures(new))
            yield from timed(new[0].run, self.pipeline.encode(new))

    def denoise(self, stage: StageName, pieces: Sequence[Piece]) -> Shared:
        """Return the steps of `stage`; none for estimates."""
        jobs = [piece.job for piece in pieces if piece.job is not None]
        if any(_errand(piece).part == "decode" for piece in pieces):
            return _NoSteps()
        rows = 2 * self.pictures if self._fixed else None
        # The base keeps its UNet: what the request needs next is another pool's.
        following: Use = self.pipeline.unet(jobs[0].run.request, "base") if self._hands_over(pieces[0]) else ""
        return Shared(self.pipeline, stage, jobs, rows=rows, next_engine=following)

    def _hands_over(self, piece: Piece) -> bool:
        return _errand(piece).part == "base"

    def decode(self, piece: Piece, *, early: bool) -> Iterator[Step]:
        """Decode a piece, or leave what the base made of it."""
        if not self._hands_over(piece):
            yield from super().decode(piece, early=early or _errand(piece).part == "decode")
            return
        assert piece.job is not None  # noqa: S101 - it has taken its steps
        self._left[piece.ticket.order.id] = Handover.of(piece.job)

    def home(self) -> None:
        """Load what the next request needs first: a refiner's pool has it."""
        if self._name != "refiner":
            super().home()

    def probe(self) -> None:
        """Draw a small picture with the expert of this pool."""
        if self._name == "both":
            super().probe()
            return
        job = self.pipeline.start(self._probe())
        job.run.timings.clear()
        for step in timed(job.run, self._part_of_probe(job)):
            if step.stage in ("base", "refiner", "decode"):
                request = job.run.request
                self._predictor.observe(step.stage, request.height * request.width, step.seconds)

    def _part_of_probe(self, job: Job) -> Iterator[Step]:
        pipeline, request = self.pipeline, job.run.request
        if self._name == "base":
            yield from pipeline.encode([job])
            yield from pipeline.base(job, pipeline.unet(request, "base"))
            return
        assert pipeline.manifest.refiner is not None  # noqa: S101 - else there is no pool of it
        # Its conditions are zeros: a refiner's pool has no use for text encoders.
        blank = _blank(pipeline, pipeline.manifest.refiner)
        job.embeds["refiner"] = (blank,), (blank,)
        yield from pipeline.refine(job)
        yield from pipeline.decode(job)


class _NoSteps(Shared):
    """No step of nobody."""

    def __init__(self) -> None:
        self.failed = {}

    def steps(self) -> Iterator[tuple[int, Step]]:
        """Return an iterator of nothing."""
        return iter(())

    def drop(self, number: int) -> None:
        """Do nothing."""


def _errand(piece: Piece) -> Errand:
    assert isinstance(piece.ticket.order, Errand)  # noqa: S101 - a pool is sent nothing else
    return piece.ticket.order


def _blank(pipeline: Pipeline, stage: Stage) -> PromptEmbeds:
    """Return embeddings of zeros, as long as one chunk."""
    inputs = {each.name: each.shape for each in pipeline.manifest.components[stage.unet].inputs}
    hidden, pooled = (int(inputs[name][-1]) for name in ("encoder_hidden_states", "text_embeds"))
    return PromptEmbeds(np.zeros((TOKENS, hidden), np.float32), np.zeros(pooled, np.float32))
