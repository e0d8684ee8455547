"""The two sides of the host-time benchmark: our pipeline with an engine that returns at once, and diffusers' loop.

Both denoise one picture of 1024² with the base (latents 1x4x128x128) and guidance 5, with the same UNet outputs. The
UNet stand-in's time is not counted, and drawing noise is timed separately: the seconds are the host's around them.
"""

__all__ = ["CASES", "ELSEWHERE", "SIDE", "HostCase", "Lap", "Precision", "Run", "our_run", "their_run"]

import inspect
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from unittest import mock

import msgspec
import numpy as np

from sdxl_trt.engines import Array, DeviceArray, Value
from sdxl_trt.engines.bundle import Component, read_bundle
from sdxl_trt.engines.residency import EnginePool
from sdxl_trt.mini import bundle_path
from sdxl_trt.runtime.diffusion.samplers import TWO_CALLS
from sdxl_trt.runtime.pipeline import Pipeline, timed
from sdxl_trt.runtime.request import Request
from sdxl_trt.runtime.text import PromptEmbeds

Precision = Literal["float32", "float16"]
SIDE = 1024
GUIDANCE = 5.0
SEED = 7
SDXL = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading",
    "steps_offset": 1, "prediction_type": "epsilon",
}  # fmt: skip


@dataclass(frozen=True)
class HostCase:
    """A sampler of ours and the equivalent diffusers scheduler; `needs` is a module that the scheduler imports."""

    sampler: str
    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: str = ""


_SDE = {"algorithm_type": "sde-dpmsolver++"}
CASES = (
    HostCase("euler", "EulerDiscreteScheduler"),
    HostCase("heun", "HeunDiscreteScheduler"),
    HostCase("dpm_2", "KDPM2DiscreteScheduler"),
    HostCase("lms", "LMSDiscreteScheduler", needs="scipy"),
    HostCase("dpmpp_2m", "DPMSolverMultistepScheduler"),
    HostCase("ddim", "DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": False}),
    HostCase("uni_pc", "UniPCMultistepScheduler"),
    HostCase("deis", "DEISMultistepScheduler"),
    HostCase("euler_ancestral", "EulerAncestralDiscreteScheduler"),
    HostCase("dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler"),
    HostCase("dpmpp_sde", "DPMSolverSDEScheduler", {"noise_sampler_seed": SEED}, needs="torchsde"),
    HostCase("dpmpp_2m_sde", "DPMSolverMultistepScheduler", _SDE),
    HostCase("dpmpp_3m_sde", "DPMSolverMultistepScheduler", _SDE | {"solver_order": 3}),
    HostCase("lcm", "LCMScheduler"),
)
ELSEWHERE = {
    "dpmpp_2s_ancestral": "diffusers has no such scheduler",
    "res_multistep": "diffusers has no such scheduler",
}
"""Samplers without a counterpart, and why."""


class Lap(NamedTuple):
    """A step's seconds: of the host without drawing noise, and of drawing noise."""

    host: float
    noise: float


Run = Callable[[], list[Lap]]
"""Denoises once. Samplers with two UNet calls per step leave out the last step, which has one call."""


class _Watch:
    """Times steps, without the time of the UNet and of drawing noise."""

    def __init__(self) -> None:
        self._aside = {"unet": 0.0, "noise": 0.0}

    def aside(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return `call` wrapped so that its time is recorded under `kind` and not counted as the host's."""

        def timed_call(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = call(*args, **options)
            self._aside[kind] += time.perf_counter() - started
            return result

        return timed_call

    def laps(self, work: Iterator[object]) -> list[Lap]:
        """Return a lap for everything that `work` yields."""
        found: list[Lap] = []
        while True:
            self._aside = dict.fromkeys(self._aside, 0.0)
            started = time.perf_counter()
            done = next(work, None)
            seconds = time.perf_counter() - started - sum(self._aside.values())
            if done is None:
                return found
            found.append(Lap(seconds, self._aside["noise"]))


def our_run(sampler: str, precision: Precision, steps: int) -> Run:
    """Return a run of the real pipeline (sampler, denoiser, bookkeeping) with an engine that returns at once."""
    watch = _Watch()
    bundle = read_bundle(bundle_path())
    unet = bundle.manifest.base.unet
    engine = _ReadyEngine(bundle.manifest.components[unet], precision)
    engine.infer = watch.aside("unet", engine.infer)  # type: ignore[method-assign]
    pipeline = Pipeline(EnginePool(bundle, lambda _name: engine, "resident", "none"))
    request = Request(
        "", sampler=sampler, steps=steps, guidance=GUIDANCE, seed=SEED, handoff=None, width=SIDE, height=SIDE
    )
    embeds = PromptEmbeds(np.zeros((77, 112), np.float32), np.zeros(64, np.float32))

    def run() -> list[Lap]:
        job = pipeline.start(request)
        job.embeds = {"base": ((embeds,), (embeds,))}
        source = job.noises["base"].source
        job.noises["base"].source = lambda *args: watch.aside("noise", source(*args))  # type: ignore[method-assign]
        work = timed(job.run, pipeline.base(job, next_engine=unet))
        next(work)  # the engine is loaded
        laps = watch.laps(work)
        return laps[:-1] if sampler in TWO_CALLS else laps

    return run


class _ReadyEngine:
    """A UNet with a constant output: a new copy each time, since the caller owns an engine's outputs."""

    def __init__(self, component: Component, precision: Precision) -> None:
        inputs = tuple(
            msgspec.structs.replace(spec, dtype=precision) if spec.name == "sample" else spec
            for spec in component.inputs
        )
        self.component = msgspec.structs.replace(component, inputs=inputs)
        self._answer = _answer(precision)

    def prefetch(self) -> None: ...

    def load(self) -> None: ...

    def adapt(self, loras: Sequence[Any]) -> None: ...

    def reserve(self, nbytes: int) -> None: ...

    def bind(self, constants: Mapping[str, Array]) -> None: ...

    def unload(self) -> None: ...

    def infer(
        self,
        inputs: Mapping[str, Value],
        outputs: Sequence[str] | None = None,  # noqa: ARG002 - part of the protocol
    ) -> dict[str, Array]:
        return {"out_sample": self._answer[: inputs["sample"].shape[0]].copy()}

    def infer_on_device(self, inputs: Mapping[str, Value]) -> dict[str, DeviceArray]:
        raise NotImplementedError(sorted(inputs))  # no ControlNet is timed

    def infer_keeping(
        self, inputs: Mapping[str, Value], kept: Collection[str], outputs: Sequence[str]
    ) -> tuple[dict[str, Array], dict[str, DeviceArray]]:
        raise NotImplementedError(sorted(inputs), kept, outputs)  # and no step is cached


def _answer(precision: Precision) -> Array:
    """Return the UNet's constant output: rows [positive, negative] of unit variance."""
    drawn = np.random.default_rng(SEED).standard_normal((2, 4, SIDE // 8, SIDE // 8), dtype=np.float32)
    return drawn.astype(precision)


def their_run(case: HostCase, precision: Precision, steps: int) -> Run:
    """Return a run of the loop of diffusers' StableDiffusionXLPipeline, without its progress bar and callbacks."""
    import diffusers  # noqa: PLC0415 - takes seconds
    import torch  # noqa: PLC0415

    scheduler = getattr(diffusers, case.scheduler)(**SDXL, **case.options)
    watch, ready = _Watch(), torch.from_numpy(_answer(precision))
    unet = watch.aside("unet", lambda sample: ready[: len(sample)].clone())
    generator = torch.Generator()
    accepted = inspect.signature(scheduler.step).parameters
    given = {"eta": 0.0, "generator": generator}
    extra = {name: value for name, value in given.items() if name in accepted}

    def denoise() -> Iterator[object]:
        latents = torch.randn((1, *ready.shape[1:]), generator=generator, dtype=ready.dtype)
        latents = latents * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            sample = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            negative, positive = unet(sample).chunk(2)
            guided = negative + GUIDANCE * (positive - negative)
            latents = scheduler.step(guided, t, latents, **extra, return_dict=False)[0]
            yield latents

    def run() -> list[Lap]:
        scheduler.set_timesteps(steps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        generator.manual_seed(SEED)
        with torch.no_grad(), _noise_aside(watch, inspect.getmodule(type(scheduler))):
            laps = watch.laps(denoise())
        calls = scheduler.order
        whole = [laps[i : i + calls] for i in range(0, len(laps) - calls + 1, calls)]
        return [Lap(*map(sum, zip(*parts, strict=True))) for parts in whole]

    return run


@contextmanager
def _noise_aside(watch: _Watch, module: Any) -> Iterator[None]:
    """Time the noise that a scheduler's module draws separately while the context is open."""
    with ExitStack() as stack:
        for owner, name in ((module, "randn_tensor"), (getattr(module, "BrownianTreeNoiseSampler", None), "__call__")):
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, watch.aside("noise", getattr(owner, name))))
        yield
