"""Several requests in one phase-major run, which computes the steps they share once."""

__all__ = ["Batch"]

from collections.abc import Hashable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from sdxl_trt.engines.adapters import Use
from sdxl_trt.runtime.diffusion.samplers import BROWNIAN
from sdxl_trt.runtime.pipeline.pipeline import Job, Pipeline
from sdxl_trt.runtime.pipeline.record import facts_of
from sdxl_trt.runtime.pipeline.run import PhaseName, Run, Step, timed
from sdxl_trt.runtime.request import Request, StageName, settings_of

KNOWS_ITS_END_COMFYUI = BROWNIAN | {"uni_pc", "uni_pc_bh2"}
"""Samplers whose steps in ComfyUI's way depend on where the run ends: requests with other handoffs share no run."""


class Batch:
    """Requests that run together: all prompts, all base steps, one change of UNets, all refiner steps, all decodes.

    Single pictures with the same base settings share its run, and each leaves it at its own handoff. Raises UsageError
    for any of the requests before anything is loaded.
    """

    def __init__(self, pipeline: Pipeline, requests: Sequence[Request]) -> None:
        self._pipeline = pipeline
        self._jobs = [pipeline.start(request) for request in requests]
        self._groups: dict[Hashable, list[int]] = {}
        for number in sorted(range(len(requests)), key=lambda number: -self._cut(number)):
            self._groups.setdefault(self._base_of(number, requests[number]), []).append(number)

    @property
    def runs(self) -> list[Run]:
        """Return the run of each request, in their order."""
        return [job.run for job in self._jobs]

    def facts(self) -> Mapping[str, Sequence[Any]]:
        """Return what the records say of the adapters of all requests, by the names of a record's fields."""
        return facts_of(self.runs)

    def steps(self) -> Iterator[tuple[int, Step]]:
        """Return an iterator of the units of work, each with the index of its request.

        Steps are counted over the batch; shared steps carry the index of the request that runs furthest.
        """
        everyone = range(len(self._jobs))
        self._pipeline.expect(self._jobs)
        for first in (self._pipeline.pictures, self._pipeline.encode):
            yield from ((0, step) for step in timed(self._jobs[0].run, first(self._jobs)))
        yield from self._phase("base", self._together("base", sorted(group[0] for group in self._groups.values())))
        refined = [number for number in everyone if self.runs[number].request.uses_refiner]
        yield from self._phase("refiner", self._together("refiner", refined))
        # If base and refiner have decoders of their own, each is loaded once.
        yield from self._phase("decode", sorted(everyone, key=self._decoder))

    def _phase(self, stage: PhaseName, numbers: Sequence[int]) -> Iterator[tuple[int, Step]]:
        """Run a stage of the jobs `numbers`, counting over all of them."""
        units = [self._units(stage, number) for number in numbers]
        for place, number in enumerate(numbers):
            after = numbers[place + 1] if place + 1 < len(numbers) else None
            for step in timed(self.runs[number], self._work(stage, number, after)):
                if step.stage != stage:
                    yield number, step
                    continue
                each = step.total // units[place]
                yield number, replace(step, index=sum(units[:place]) * each + step.index, total=sum(units) * each)

    def _together(self, stage: StageName, numbers: Sequence[int]) -> list[int]:
        """Return `numbers` with those of equal LoRAs in a row: the UNet is changed once for each set."""
        sets = [self._unet(stage, number) for number in numbers]
        return sorted(numbers, key=lambda number: sets.index(self._unet(stage, number)))

    def _unet(self, stage: StageName, number: int) -> Use:
        return self._pipeline.unet(self.runs[number].request, stage)

    def _work(self, stage: PhaseName, number: int, after: int | None) -> Iterator[Step]:
        """Run a stage of job `number`; job `after` is the next in it, None if `number` is the last."""
        job = self._jobs[number]
        if stage == "base":
            refined = [run.request for run in self.runs if run.request.uses_refiner]
            refiner = self._pipeline.unet(refined[0], "refiner") if refined else ""
            return self._base(number, next_engine=refiner if after is None else self._unet("base", after))
        if stage == "refiner":
            return self._pipeline.refine(job, next_engine="" if after is None else self._unet("refiner", after))
        return self._pipeline.decode(job)

    def _base(self, leader: int, next_engine: Use) -> Iterator[Step]:
        """Run the base steps of a job, and give its latents to the jobs that share them at their handoffs."""
        (group,) = (group for group in self._groups.values() if group[0] == leader)
        for step in self._pipeline.base(self._jobs[leader], next_engine):
            if step.stage == "base":
                for number in group[1:]:
                    if self._cut(number) == step.index:
                        _hand_over(step, self._jobs[leader], self._jobs[number])
            yield step

    def _base_of(self, number: int, request: Request) -> Hashable:
        """Return a key of the base run that a request needs: requests with equal keys share it."""
        resolved = self.runs[number].request
        if len(resolved.seeds) > 1:
            return number
        free = {"refiner"}
        knows_its_end = resolved.comfyui and resolved.request.sampler in KNOWS_ITS_END_COMFYUI
        # A base that leaves no noise ends at sigma 0 wherever it stops.
        on_grid = resolved.base.leftover_noise or resolved.base.stop == resolved.schedule.steps
        if on_grid and not knows_its_end:
            free.add("handoff")
        if "aesthetic_score" not in self._pipeline.manifest.base.time_ids:
            free.add("score")
        declared = settings_of(Request).values()
        asked = {each.name: getattr(request, each.name) for each in declared if each.stage not in free}
        asked["sampler"] = resolved.request.sampler
        # Arrays are not hashable.
        asked |= {"latents": id(request.latents), "image": id(request.image), "mask": id(request.mask)}
        loras = tuple(resolved.loras.get("base", ()))
        return (*asked.items(), loras, resolved.base.start, resolved.seeds, resolved.width, resolved.height)

    def _cut(self, number: int) -> int:
        return self.runs[number].request.base.steps

    def _units(self, stage: PhaseName, number: int) -> int:
        """Return how many steps, or pictures to decode, a job has in a stage, for each group of its pictures."""
        request = self.runs[number].request
        refiner = request.refiner.steps if request.refiner else 0
        return {"base": request.base.steps, "refiner": refiner}.get(stage, len(request.seeds))

    def _decoder(self, number: int) -> str:
        return self._pipeline.vae(self.runs[number].request).decoder


def _hand_over(step: Step, leader: Job, other: Job) -> None:
    """Leave `other` as its own base run would after `step` of `leader`: the same latents and state of the noise."""
    assert step.latents is not None  # noqa: S101 - it is a sampler's
    keeper, part = other.keeper("base"), other.run.request.base
    other.latents = step.latents.copy()
    if keeper is not None:
        other.latents = keeper.ended(other.latents, float(part.sigmas(other.run.request.schedule.sigmas)[-1]))
    other.run.full_steps = dict(leader.run.full_steps)
    base, own = deepcopy(leader.noises["base"]), other.noises["refiner"]
    # A refiner without a seed of its own continues the base's noise.
    other.noises = {"base": base, "refiner": base if own is other.noises["base"] else own}
