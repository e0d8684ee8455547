"""What an expert's steps for a job consist of: its conditions, and a sampler for each group of its pictures."""

__all__ = ["Phase", "begin_refiner", "control_parts", "groups"]

import math
from collections.abc import Iterator, Sequence

import numpy as np

from sdxl_trt.engines import Engine, numpy_dtype
from sdxl_trt.engines.bundle import Stage
from sdxl_trt.runtime.arrays import Latents
from sdxl_trt.runtime.diffusion import Conditions, ControlPart, Estimator, StepCache, make_conditions
from sdxl_trt.runtime.diffusion.samplers import FEW_STEPS, Asking, bind_sampler, brownian_span
from sdxl_trt.runtime.pipeline.run import Handoff, Job
from sdxl_trt.runtime.request import ResolvedRequest, StageName


class Phase:
    """One expert's steps for the pictures of `job`, whose prompts are encoded; any group of them can be asked for."""

    def __init__(self, job: Job, name: StageName, stage: Stage) -> None:
        request = job.run.request
        self.job = job
        self.stage = stage
        self.name: StageName = name
        self.guidance = request.guidance_of(name)
        self.sampler, self.part = request.denoising_of(name)
        self.schedule = request.schedule_of(name)
        self.predicts = request.prediction_type_of(stage.scheduler)
        self.embeds = job.embeds[name]

    @property
    def steps(self) -> int:
        """Return the number of steps that each picture takes."""
        return self.part.steps

    @property
    def blocks(self) -> int:
        """Return the number of rows that a picture has in a call: one for each conditioning of either side."""
        return len(self.embeds[0]) + (len(self.embeds[1]) if self.guidance.wanted else 0)

    @property
    def tokens(self) -> int:
        """Return the length to which its prompts are repeated."""
        sides = self.embeds if self.guidance.wanted else self.embeds[:1]
        return math.lcm(*(len(embeds.hidden) for side in sides for embeds in side))

    def conditions(self, engine: Engine, pictures: int) -> Conditions:
        """Return the constant inputs of `engine`, the expert's UNet, for `pictures` pictures."""
        positive, negative = ([each.micro for each in side.all] for side in self.job.run.request.sides[self.name])
        return make_conditions(
            engine,
            self.stage,
            *self.embeds,
            (positive, negative),
            self.guidance.scale,
            pictures,
            comfyui_rule=self.guidance.comfyui_rule,
        )

    def further(self, group: slice) -> Latents | None:
        """Return what an inpainting UNet receives behind the latents of the pictures `group`; None for all others."""
        further = self.job.further if self.name == "base" else None
        return None if further is None else further[group]

    def cache(self, engine: Engine, shallow: Engine | None = None) -> StepCache | None:
        """Return what answers some calls of a group of pictures with `shallow`; None without it.

        Every group has one of its own: features are those of its pictures.
        """
        policy = self.job.run.request.cache_of(self.name)
        if policy is None or shallow is None:
            return None
        return StepCache(engine, shallow, policy)

    def estimator(self, engine: Engine, group: slice) -> Estimator:
        """Return what asks `engine` for the pictures `group`, without calling it."""
        pictures = len(self.job.latents[group])
        dtype = numpy_dtype(engine.component.input("sample"))
        conditions = self.conditions(engine, pictures)
        return Estimator(dtype, self.schedule, conditions, self.predicts, self.guidance, self.further(group))

    def asking(self, group: slice) -> Asking:
        """Return the sampler of the pictures `group` at the start of its steps.

        It owns the memory that it works in: it starts from a copy of the job's latents.
        """
        request, latents = self.job.run.request, self.job.latents
        sigmas = self.part.sigmas(self.schedule.sigmas)
        span = brownian_span(self.sampler, sigmas, self.schedule.sigmas, comfyui=request.comfyui)
        short_end = self.part.stop == self.schedule.steps < FEW_STEPS
        drawn = self.job.noises[self.name].source(latents.shape[1:], group, span)
        sample = bind_sampler(self.sampler, drawn, comfyui=request.comfyui, short_end=short_end)
        keeper = self.job.keeper(self.name)
        sample = sample if keeper is None else keeper.of(group).around(sample)
        return sample(latents[group].copy(), sigmas)


def control_parts(request: ResolvedRequest, engines: Sequence[Engine]) -> Iterator[ControlPart]:
    """Yield the ControlNets of a request with their engines, pictures, scales and spans."""
    for control, engine in zip(request.controls, engines, strict=True):
        use, (above, up_to) = control.use, request.control_span(control)
        yield ControlPart(
            engine,
            control.prepared((request.height, request.width), comfyui=request.comfyui),
            positive=0.0 if use.side == "negative" else use.scale,
            negative=0.0 if use.side == "positive" else use.scale,
            above=above,
            up_to=up_to,
            guess=request.request.control_guess,
        )


def groups(count: int, size: int) -> list[slice]:
    """Return `count` pictures in groups of at most `size`."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def begin_refiner(job: Job) -> None:
    """Let the refiner of `job` start from what the base left, and record it; with the refiner alone, do nothing.

    Its latents are a copy, with noise if the refiner adds its own. What stays outside a mask gets new noise too in
    diffusers; in ComfyUI it is what the refiner receives.
    """
    request, part = job.run.request, job.run.request.refiner
    if part is None or request.refiner_only:
        return
    job.run.handoff_latents, job.run.handoff = job.latents, _place(request)
    job.keep_picture()
    draws = part.add_noise or (job.mask is not None and not request.comfyui)
    drawn = job.noises["refiner"].draw(job.latents.shape[1:]) if draws else np.zeros_like(job.latents)
    job.kept_noise = drawn
    if request.comfyui:
        job.clean = job.latents
    job.latents = part.noised(job.latents, drawn, request.refiner_schedule)


def _place(request: ResolvedRequest) -> Handoff:
    schedule, start = request.refiner_schedule, request.denoising_of("refiner")[1].start
    return Handoff(request.cut, float(schedule.timesteps[start]), float(schedule.sigmas[start]))
