"""The steps of the schedule that base and refiner take: split by one handoff, or set for each as in ComfyUI.

At a handoff the base stops where the refiner starts, and passes on its noisy latents. ComfyUI's KSamplerAdvanced sets
start, end, added and leftover noise of each sampler separately; ranges that do not fit together run, with a warning. A
run that starts from a picture starts at a later step, which may leave the base no step.
"""

__all__ = ["DEFAULT_HANDOFF", "StageRanges", "StepRange", "split_steps", "step_at_fraction", "step_at_sigma"]

import logging
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import UsageError
from sdxl_trt.runtime.diffusion.schedules import Schedule
from sdxl_trt.runtime.request.request import Request
from sdxl_trt.runtime.request.settings import check_settings

log = logging.getLogger("sdxl_trt.runtime")
DEFAULT_HANDOFF = 0.8


@dataclass(frozen=True)
class StepRange:
    """The steps `start` to `stop` of a schedule, as one KSamplerAdvanced runs them; none if `stop` is not later."""

    start: int
    stop: int
    add_noise: bool = False
    leftover_noise: bool = True

    @property
    def steps(self) -> int:
        """Return the number of steps."""
        return max(self.stop - self.start, 0)

    def sigmas(self, grid: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return this range of (steps + 1,) sigmas; without leftover noise an early end is a last step to sigma 0."""
        part = grid[self.start : self.stop + 1]
        if self.leftover_noise or self.stop == len(grid) - 1:
            return part
        return np.append(part[:-1], np.float32(0.0))

    def noised(
        self, latents: NDArray[np.float32], noise: NDArray[np.float32], schedule: Schedule
    ) -> NDArray[np.float32]:
        """Return new `latents` with unit-variance `noise` scaled to the first sigma, if this range adds noise.

        A range without a step returns a copy.
        """
        if not self.add_noise or not self.steps:
            return latents.copy()
        scale = schedule.initial_scale if self.start == 0 else schedule.sigmas[self.start]
        return latents + noise * np.float32(scale)


@dataclass(frozen=True)
class StageRanges:
    """The base's range of the schedule, and the refiner's, or None if it does nothing.

    `first` is the refiner's range if it starts the run, and so adds the noise; None if the base does.
    """

    base: StepRange
    refiner: StepRange | None
    first: StepRange | None = None


def split_steps(
    settings: Request,
    schedule: Schedule,
    *,
    refiner: bool,
    picture: int | None = None,
    refiner_schedule: Schedule | None = None,
) -> StageRanges:
    """Return the ranges of `schedule` that base and refiner run for `settings`, in a bundle with or without `refiner`.

    The refiner's is a range of `refiner_schedule`, if it has one of its own. `picture` is the step at which a picture
    is the start, or None for pure noise; if it is at or after the handoff, the refiner alone runs. Raises UsageError
    for settings that contradict each other or the bundle; warns of ranges that do not fit together.
    """
    _check(settings, refiner=refiner)
    steps, begin = schedule.steps, settings.base_start_step if picture is None else picture
    if settings.refine:
        return _refining(settings, begin, steps)
    if not _wants_refiner(settings, refiner=refiner):
        end = steps if settings.base_end_step is None else min(settings.base_end_step, steps)
        base = StepRange(begin, end, settings.base_add_noise, settings.leftover_noise or False)
        _warn_of_idle(base)
        return StageRanges(base, None)
    stop, start = _ends(settings, schedule, begin=None if picture is None else begin)
    stated = settings.base_end_step is not None or settings.refiner_start_step is not None
    if picture is not None and start <= begin and not stated:
        log.warning("the picture comes in at step %d, at or behind the handoff: the refiner alone changes it", begin)
        return _refining(settings, begin, steps)
    leftover = settings.leftover_noise is not False
    base = StepRange(begin, min(stop, steps), settings.base_add_noise, leftover)
    steps = schedule.steps if refiner_schedule is None else refiner_schedule.steps
    last = steps if settings.refiner_end_step is None else min(settings.refiner_end_step, steps)
    refining = StepRange(start, last, settings.refiner_add_noise, settings.refiner_leftover_noise)
    _warn_of_idle(base)
    if not refining.steps:
        # With a single step the default handoff leaves the refiner none, which needs no warning.
        if settings.refiner_start_step is not None or settings.base_end_step is not None:
            log.warning("the refiner would start at step %d of %d: it does nothing; start it earlier", start, last)
        return StageRanges(base, None)
    if refiner_schedule is None:
        _warn_of_misfits(base, refining, steps)
    return StageRanges(base, refining)


def _refining(settings: Request, begin: int, steps: int) -> StageRanges:
    """Return the ranges for a picture that only the refiner changes: it starts the run, and so adds the noise."""
    end = steps if settings.refiner_end_step is None else min(settings.refiner_end_step, steps)
    refiner = StepRange(begin, end, leftover_noise=settings.refiner_leftover_noise)
    if not refiner.steps:
        log.warning("the refiner would start at step %d of %d: it does nothing; start it earlier", begin, end)
    return StageRanges(StepRange(begin, begin), refiner, first=replace(refiner, add_noise=settings.base_add_noise))


def _check(settings: Request, *, refiner: bool) -> None:
    check_settings(settings)
    stated = {
        "--handoff": None if settings.handoff == "auto" else settings.handoff,
        "--handoff-step": settings.handoff_step,
        "--handoff-sigma": settings.handoff_sigma,
    }
    handoffs = [option for option, value in stated.items() if value is not None]
    ends = {"--base-end-step": settings.base_end_step, "--refiner-start-step": settings.refiner_start_step}
    free = [option for option, value in ends.items() if value is not None]
    if settings.refine:
        _check_refine(handoffs + free, settings, refiner=refiner)
    if not refiner and (handoffs or settings.refiner_start_step is not None):
        raise UsageError(f"a handoff was asked for, but the bundle has no refiner; leave {(handoffs or free)[0]} out,"
                         " or export the bundle with --refiner SRC")  # fmt: skip
    if handoffs and len(handoffs) + len(free) > 1:
        one, other = [*handoffs, *free][:2]
        raise UsageError(f"{one} and {other} state the same thing; give one of them")
    if settings.handoff is None and not handoffs and settings.refiner_start_step is not None:
        raise UsageError("--refiner-start-step says where the refiner starts, --no-refiner that it does not; choose")


def _check_refine(stated: list[str], settings: Request, *, refiner: bool) -> None:
    if not refiner:
        raise UsageError("--refine takes a refiner, and the bundle has none; use --image, or export the bundle with"
                         " --refiner SRC")  # fmt: skip
    if stated or settings.handoff is None:
        option = (stated or ["--no-refiner"])[0]
        raise UsageError(f"--refine has the refiner alone change a picture; leave {option} out, or use --image")


def _wants_refiner(settings: Request, *, refiner: bool) -> bool:
    alone = settings.handoff is None and settings.handoff_step is None and settings.handoff_sigma is None
    return refiner and not alone


def _ends(settings: Request, schedule: Schedule, begin: int | None) -> tuple[int, int]:
    """Return the step where the base stops and the one where the refiner starts; `begin` is a picture's first step."""
    stop, start = settings.base_end_step, settings.refiner_start_step
    if stop is None and start is None:
        stop = start = _handoff(settings, schedule, picture=begin is not None)
    # If only one is given, the other is the same.
    stop = start if stop is None else stop
    start = stop if start is None else start
    assert stop is not None  # noqa: S101 - for the type checker
    assert start is not None  # noqa: S101
    return stop, start


def _handoff(settings: Request, schedule: Schedule, *, picture: bool) -> int:
    """Return the step of the handoff; each expert has at least one step, except the base of a `picture`."""
    steps = schedule.steps
    least = 0 if picture else 1
    if settings.handoff_step is not None:
        if not least <= settings.handoff_step < steps:
            raise UsageError(f"--handoff-step {settings.handoff_step}: choose {least} to {steps - 1} of {steps} steps,"
                             " or --no-refiner")  # fmt: skip
        return settings.handoff_step
    if settings.handoff_sigma is not None:
        return _check_not_empty(step_at_sigma(schedule, settings.handoff_sigma), least, steps,
                         f"--handoff-sigma {settings.handoff_sigma:g}")  # fmt: skip
    fraction = DEFAULT_HANDOFF if settings.handoff == "auto" else settings.handoff
    assert fraction is not None  # noqa: S101 - then no refiner is wanted
    cut = step_at_fraction(schedule, fraction)
    # The default handoff yields if there are few steps: a single step is the base's.
    return (
        max(cut, least) if settings.handoff == "auto" else _check_not_empty(cut, least, steps, f"--handoff {fraction}")
    )


def _check_not_empty(cut: int, least: int, steps: int, option: str) -> int:
    if least <= cut < steps:
        return cut
    idle = "base" if cut == 0 else "refiner"
    raise UsageError(f"{option} leaves the {idle} no step of {steps}; take more steps, another place, or --no-refiner")


def _warn_of_idle(base: StepRange) -> None:
    if not base.steps:
        log.warning("the base would start at step %d and stop at %d: it does nothing", base.start, base.stop)


def _warn_of_misfits(base: StepRange, refiner: StepRange, steps: int) -> None:
    if base.stop != refiner.start:
        between = "are left out" if base.stop < refiner.start else "are taken twice"
        log.warning("the base stops at step %d, the refiner starts at %d: the steps between %s", base.stop,
                    refiner.start, between)  # fmt: skip
    if refiner.add_noise:
        log.warning("the refiner adds noise to what the base hands over; it needs none where it takes over noise")
    elif base.stop < steps and not base.leftover_noise:
        log.warning("the base leaves no noise, and the refiner, which starts at step %d, adds none", refiner.start)


def step_at_fraction(schedule: Schedule, fraction: float) -> int:
    """Return how many steps the base takes for diffusers' ``denoising_end = denoising_start = fraction``.

    The base keeps the timesteps at or above the cutoff, the refiner those below it.
    """
    total = schedule.num_train_timesteps
    cutoff = round(total - fraction * total)
    return int(np.count_nonzero(schedule.timesteps >= cutoff))


def step_at_sigma(schedule: Schedule, sigma: float) -> int:
    """Return how many steps the base takes to the first sigma at or below `sigma`; all steps if there is none."""
    # A sigma copied from the schedule in decimal digits counts as the schedule's own.
    return int(np.count_nonzero(schedule.sigmas[:-1] > sigma * (1.0 + 1e-5)))
