"""Several requests that take an expert's steps in common calls of its UNet, each in rows of its own.

The samplers ask for their estimates, and all that ask at the same time are answered together. The rows need not be at
one sigma; a sampler that asks twice in a step takes part in twice as many calls.
"""

__all__ = ["Shared"]

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import Array, CorruptError, Engine, UsageError, numpy_dtype
from sdxl_trt.engines.adapters import Use
from sdxl_trt.runtime.arrays import Latents
from sdxl_trt.runtime.diffusion import Estimator, in_float32, read_only
from sdxl_trt.runtime.diffusion.samplers import Ask, Asking
from sdxl_trt.runtime.pipeline.denoising import Phase, begin_refiner, groups
from sdxl_trt.runtime.pipeline.pipeline import Pipeline
from sdxl_trt.runtime.pipeline.run import Job, Step
from sdxl_trt.runtime.pipeline.sharing import differing, share_key
from sdxl_trt.runtime.request import StageName

Steps = list[tuple[int, Step]]


@dataclass(eq=False)
class _Lane:
    """Some pictures of a job, which have a sampler of their own: `latents` are theirs after the latest step."""

    number: int
    pictures: slice
    estimator: Estimator
    asking: Asking
    ask: Ask | None = None
    latents: Latents | None = None
    denoised: Latents | None = None
    done: int = 0

    def go_on(self) -> None:
        """Take what the sampler says next: a question, or nothing more."""
        self._heard(next(self.asking, None))

    def answer(self, prediction: NDArray[np.float32]) -> None:
        """Answer the question from the UNet's output for its rows. Raises CorruptError for NaN or infinity."""
        x, sigma = self._asked
        estimate = self.estimator.clean(prediction, x, sigma, guided=self.estimator.guided(sigma))
        self.denoised = read_only(estimate)
        self._heard(self.asking.send(estimate))

    def _heard(self, said: Ask | Latents | None) -> None:
        self.ask, self.latents = (said, None) if isinstance(said, Ask) else (None, said)

    @property
    def _asked(self) -> Ask:
        assert self.ask is not None  # noqa: S101 - only lanes that ask are in a call
        return self.ask

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of its part of the UNet's input."""
        x, sigma = self._asked
        return self.estimator.shape(x, guided=self.estimator.guided(sigma))

    @property
    def tokens(self) -> int:
        """Return the length of its prompts."""
        return int(self.estimator.conditions.inputs["encoder_hidden_states"].shape[1])

    def write(self, sample: Array, timestep: NDArray[np.float32]) -> None:
        """Write its rows of the UNet's input."""
        self.estimator.write(*self._asked, sample, timestep)


class Shared:
    """The steps of one stage of several jobs, encoded and alike (`share_key`), in common calls of the UNet.

    Pictures are those of each job alone, to rounding: another number of rows may run other kernels. With `rows`, every
    call has exactly that many, and free ones repeat another: then the bits of a picture do not depend on which jobs
    share its calls. Rows beyond `rows`, or beyond what the plans or the pipeline take, go into further calls. A job
    with a ControlNet or a step cache runs alone, and `rows` has no effect on it.

    `next_engine` is needed afterwards, by default what the first job needs next. Raises UsageError for jobs that cannot
    share calls, and for `rows` that the plans do not take or that are too few for a picture.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        stage: StageName,
        jobs: Sequence[Job],
        *,
        rows: int | None = None,
        next_engine: Use = "",
    ) -> None:
        self.failed: dict[int, Exception] = {}
        """What ended a job before its last step, by its index: the UNet's answer for its rows was NaN or infinity."""
        self.on_call: Callable[[int, int], None] = lambda *_: None
        """Called before each common call with the rows that jobs use, and with all its rows."""
        self._pipeline = pipeline
        self._stage: StageName = stage
        self._jobs = list(jobs)
        self._rows = rows
        self._next_engine = next_engine
        self._dropped: set[int] = set()
        self._bound: tuple[object, ...] = ()
        self._sample: Array = np.empty(0)
        _check_alike(self._jobs, stage)
        self._runs = _takes_steps(jobs[0], stage)
        self._profiles = pipeline.pool.profiles(pipeline.manifest.stages()[stage].unet)
        self._together = share_key(jobs[0].run.request, stage) is not None
        self._phases: list[Phase] = []
        if self._runs and self._together:
            expert = pipeline.manifest.stages()[stage]
            self._phases = [Phase(job, stage, expert) for job in self._jobs]
            self._check_rows()

    def drop(self, number: int) -> None:
        """Leave out job `number` from the next call on: it takes no more steps, and the others' pictures stay the same.

        Its latents are then of no use: a request that comes again is started again.
        """
        if not 0 <= number < len(self._jobs):
            raise UsageError(f"job {number} of {len(self._jobs)} shared ones; give an index from 0")
        self._dropped.add(number)

    def steps(self) -> Iterator[tuple[int, Step]]:
        """Return an iterator of the units of work of `Pipeline.base` or `refine`, each with the index of its job.

        The seconds of a step are those of its call, which all jobs in the call waited for. Every job's latents are
        those after its steps when its last step is yielded. What the engine itself raises ends all jobs.
        """
        started = time.perf_counter()
        for made in self._work():
            seconds, shown = time.perf_counter() - started, False
            for number, step in made:
                if not self._gone(number):
                    shown = True
                    self._jobs[number].run.timings.setdefault(step.stage, []).append(seconds)
                    yield number, replace(step, seconds=seconds)
            if shown:
                started = time.perf_counter()

    def _gone(self, number: int) -> bool:
        return number in self._dropped or number in self.failed

    def _work(self) -> Iterator[Steps]:
        """Yield the steps that each call ends; an empty list after a call that ends none."""
        if not self._runs:
            return
        if not self._together:
            yield from self._alone()
            return
        if self._stage == "refiner":
            for job in self._jobs:
                begin_refiner(job)
        first = self._jobs[0].run.request
        self._make_room()
        (engine,) = self._pipeline.pool.phase(
            self._pipeline.unet(first, self._stage),
            next_engines=(self._next_engine or self._pipeline.next_engine(first, self._stage),),
        )
        yield [(number, Step("load", 1, 1, slice(0, len(job.latents)))) for number, job in enumerate(self._jobs)]
        yield from self._share(engine)

    def _alone(self) -> Iterator[Steps]:
        """Run the only job as the pipeline does."""
        run = self._pipeline.base if self._stage == "base" else self._pipeline.refine
        try:
            for step in run(self._jobs[0], self._next_engine):
                yield [(0, step)]
                if self._gone(0):
                    return
        except CorruptError as exc:
            self.failed[0] = exc

    def _share(self, engine: Engine) -> Iterator[Steps]:
        lanes = [lane for number in range(len(self._jobs)) for lane in self._lanes(number, engine)]
        counts = [0] * len(self._jobs)
        while lanes:
            for lane in lanes:
                if lane.ask is None and not self._gone(lane.number):
                    lane.go_on()
            lanes = [lane for lane in lanes if lane.ask is not None and not self._gone(lane.number)]
            for call in self._calls(lanes):
                going = [lane for lane in call if not self._gone(lane.number)]
                if going:
                    self._answer(engine, going)
                yield [self._step(lane, counts) for lane in going if lane.latents is not None]

    def _lanes(self, number: int, engine: Engine) -> Iterator[_Lane]:
        phase = self._phases[number]
        for pictures in groups(len(phase.job.latents), self._size(number)):
            yield _Lane(number, pictures, phase.estimator(engine, pictures), phase.asking(pictures))

    def _calls(self, lanes: Sequence[_Lane]) -> list[list[_Lane]]:
        """Return the lanes of each call, in their order: prompts of one length, and no more rows than a call takes."""
        calls: list[list[_Lane]] = []
        for lane in sorted(lanes, key=lambda lane: lane.tokens):
            last = calls[-1] if calls else []
            rows = sum(each.shape[0] for each in (*last, lane))
            if last and last[0].tokens == lane.tokens and rows <= self._most:
                last.append(lane)
            else:
                calls.append([lane])
        return calls

    def _answer(self, engine: Engine, call: Sequence[_Lane]) -> None:
        """Answer the lanes of a call; a job with NaN in its rows has failed."""
        spans, used = [], 0
        for lane in call:
            spans.append(slice(used, used + lane.shape[0]))
            used = spans[-1].stop
        shape = call[0].shape
        rows = self._padded(used, shape[1:], call[0].tokens)
        self._bind(engine, call, spans, rows)
        if self._sample.shape != (rows, *shape[1:]):
            self._sample = np.empty((rows, *shape[1:]), numpy_dtype(engine.component.input("sample")))
        sample, timestep = self._sample, np.empty(rows, np.float32)
        for lane, span in zip(call, spans, strict=True):
            lane.write(sample[span], timestep[span])
        sample[used:], timestep[used:] = sample[used - 1], timestep[used - 1]
        self.on_call(used, rows)
        prediction = in_float32(engine.infer({"sample": sample, "timestep": timestep})["out_sample"])
        for lane, span in zip(call, spans, strict=True):
            if not self._gone(lane.number):
                try:
                    lane.answer(prediction[span])
                except CorruptError as exc:
                    self.failed[lane.number] = exc

    def _bind(self, engine: Engine, call: Sequence[_Lane], spans: Sequence[slice], rows: int) -> None:
        """Bind the conditions of the rows of a call, unless they are those of the call before."""
        key = (rows, *((lane, span.stop) for lane, span in zip(call, spans, strict=True)))
        if key == self._bound:
            return
        names = call[0].estimator.conditions.inputs
        inputs = {}
        for name in names:
            parts = [lane.estimator.conditions.inputs[name][: span.stop - span.start]
                     for lane, span in zip(call, spans, strict=True)]  # fmt: skip
            free = rows - spans[-1].stop
            inputs[name] = np.concatenate([*parts, np.repeat(parts[-1][-1:], free, axis=0)])
        engine.bind(inputs)
        self._bound = key

    def _step(self, lane: _Lane, counts: list[int]) -> tuple[int, Step]:
        """Return the step that a lane ended; its pictures' latents are written after the last one."""
        assert lane.latents is not None  # noqa: S101 - asked for lanes that ended a step
        number, steps = lane.number, self._phases[lane.number].steps
        counts[number] += 1
        lane.done += 1
        self._jobs[number].run.full_steps[self._stage] = lane.done
        latents = self._jobs[number].latents
        if lane.done == steps:
            latents[lane.pictures] = lane.latents
        total = steps * len(groups(len(latents), self._size(number)))
        step = Step(self._stage, counts[number], total, lane.pictures, latents=lane.latents.copy(),
                    denoised=lane.denoised)  # fmt: skip
        return number, step

    def _size(self, number: int) -> int:
        """Return the number of pictures of a job that share a sampler: as many as a call takes."""
        return max(min(self._pipeline.pictures_at_once, self._most // self._phases[number].blocks), 1)

    @property
    def _most(self) -> int:
        """Return the most rows of a call; a single picture with more conditionings has a call of its own."""
        return 2 * self._pipeline.pictures_at_once if self._rows is None else self._rows

    def _padded(self, rows: int, size: tuple[int, ...], tokens: int) -> int:
        """Return the rows of a call that must have `rows`: the next number that a profile takes at a `size`.

        If there is none, the engine says what it takes.
        """
        if self._rows is not None:
            return self._rows
        return min(self._taken(rows, size, tokens), default=rows)

    def _taken(self, rows: int, size: tuple[int, ...], tokens: int) -> list[int]:
        """Return the least number of rows, from `rows` on, that each fitting profile of the UNet's plan takes."""
        taken = []
        for profile in self._profiles:
            sample, hidden = profile.shapes["sample"], profile.shapes["encoder_hidden_states"]
            most = max(rows, sample[0][0])
            shapes = {"sample": (most, *size), "encoder_hidden_states": (most, tokens, hidden[0][2])}
            if profile.holds(shapes):
                taken.append(most)
        return taken

    def _check_rows(self) -> None:
        """Raise UsageError for a fixed number of rows that holds no picture, or that the plans do not take."""
        if self._rows is None:
            return
        for number, phase in enumerate(self._phases):
            if phase.blocks > self._rows:
                raise UsageError(f"rows={self._rows}: a picture of job {number} has {phase.blocks} conditionings, a row"
                                 f" each; give rows={phase.blocks} or more")  # fmt: skip
            taken = self._taken(self._rows, self._jobs[number].latents.shape[1:], phase.tokens)
            if self._rows not in taken and self._profiles:
                better = f"rows={min(taken)}" if taken else "fewer rows"
                raise UsageError(f"rows={self._rows}: the UNet's plan takes no call of that many; give {better}")

    def _make_room(self) -> None:
        """Let the pool make room for the largest call."""
        rows = sum(phase.blocks * len(phase.job.latents) for phase in self._phases)
        tokens = max(phase.tokens for phase in self._phases)
        for phase in self._phases:
            self._pipeline.make_room(phase.job.run.request, self._rows or min(rows, self._most), tokens)


def _check_alike(jobs: Sequence[Job], stage: StageName) -> None:
    """Raise UsageError unless the jobs are encoded and can share calls; one alone can always run."""
    if not jobs:
        raise UsageError("no job to share a call; give at least one")
    keys = [share_key(job.run.request, stage) for job in jobs]
    for number, (job, key) in enumerate(zip(jobs, keys, strict=True)):
        if stage not in job.embeds and _takes_steps(job, stage):
            raise UsageError(f"job {number}: its prompts are not encoded; call Pipeline.encode first")
        if key is None or keys[0] is None:
            if len(jobs) > 1:
                raise UsageError(f"job {number if key is None else 0}: a request with a ControlNet or a step cache"
                                 f" shares no call of the {stage}; run it alone")  # fmt: skip
        elif key != keys[0]:
            raise UsageError(f"jobs 0 and {number} share no call of a UNet: their {differing(keys[0], key)} differs;"
                             " put those of one share_key together")  # fmt: skip


def _takes_steps(job: Job, stage: StageName) -> bool:
    return job.run.request.base.steps > 0 if stage == "base" else job.run.request.uses_refiner
