"""Where base and refiner start and stop on their common grid: by one handoff, or each by itself as in ComfyUI.

A handoff is one cut: the base stops where the refiner starts, and hands over its noise. ComfyUI's KSamplerAdvanced
states start, end, added and leftover noise of each sampler apart; what then does not fit together is done all the
same, with a warning. A picture comes in further on, and may leave the base nothing to do.
"""

__all__ = ["StageRanges", "StepRange", "split_steps", "step_at_fraction", "step_at_sigma"]

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
    """The steps `start` to `stop` of a grid, as one KSamplerAdvanced takes them: none where `stop` is not later."""

    start: int
    stop: int
    add_noise: bool = False
    leftover_noise: bool = True

    @property
    def steps(self) -> int:
        """Return the number of steps."""
        return max(self.stop - self.start, 0)

    def sigmas(self, grid: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the part's of (steps + 1,) sigmas; without leftover noise an early end is a last step to sigma 0."""
        part = grid[self.start : self.stop + 1]
        if self.leftover_noise or self.stop == len(grid) - 1:
            return part
        return np.append(part[:-1], np.float32(0.0))

    def noised(
        self, latents: NDArray[np.float32], noise: NDArray[np.float32], schedule: Schedule
    ) -> NDArray[np.float32]:
        """Return new `latents` with unit-variance `noise` of the sigma that the part starts at, if it adds any.

        A part without a step leaves them as they are.
        """
        if not self.add_noise or not self.steps:
            return latents.copy()
        scale = schedule.initial_scale if self.start == 0 else schedule.sigmas[self.start]
        return latents + noise * np.float32(scale)


@dataclass(frozen=True)
class StageRanges:
    """The base's part of a grid, and the refiner's; None where it does nothing.

    `first` is the refiner's part where that starts the run, and so adds the noise; None where the base does.
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
    """Return the parts of `schedule` that `settings` come to for a bundle with or without `refiner`.

    The refiner's is one of `refiner_schedule`, where it has a grid of its own. `picture` is the step at which a picture
    comes in, None where the run starts from noise alone. Where that is at or behind the handoff, the refiner takes it
    from there. Raises UsageError for what contradicts itself or the bundle; warns of parts that do not fit together.
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
        # With a single step the usual handoff leaves the refiner none, which needs no warning.
        if settings.refiner_start_step is not None or settings.base_end_step is not None:
            log.warning("the refiner would start at step %d of %d: it does nothing; start it earlier", start, last)
        return StageRanges(base, None)
    if refiner_schedule is None:
        _warn_of_misfits(base, refining, steps)
    return StageRanges(base, refining)


def _refining(settings: Request, begin: int, steps: int) -> StageRanges:
    """Return the cuts of a picture that the refiner alone changes: it starts the run, and so adds the noise."""
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
    """Return where the base stops and the refiner starts; `begin` is where a picture comes in."""
    stop, start = settings.base_end_step, settings.refiner_start_step
    if stop is None and start is None:
        stop = start = _handoff(settings, schedule, picture=begin is not None)
    # Where one is stated, the other one is the same.
    stop = start if stop is None else stop
    start = stop if start is None else start
    assert stop is not None  # noqa: S101 - for the type checker
    assert start is not None  # noqa: S101
    return stop, start


def _handoff(settings: Request, schedule: Schedule, *, picture: bool) -> int:
    """Return the step of the one cut; each expert has a step at least, but for a `picture` the base."""
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
    # The usual handoff gives way where steps are few: with one, the base alone takes it.
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
    """Return how many steps the base takes to the first sigma of the grid at or below `sigma`; all for none of them."""
    # A sigma that was read off the grid, in decimal digits, is that of the grid.
    return int(np.count_nonzero(schedule.sigmas[:-1] > sigma * (1.0 + 1e-5)))
