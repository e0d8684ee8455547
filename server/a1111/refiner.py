"""Where A1111 changes to the refiner: before the first call of the model that is far enough.

By default that goes by the noise: the number of the training timestep nearest to the call's sigma, from the noisy end,
in thousandths. With its option `refiner_switch_by_sample_steps` it goes by the steps. (`apply_refiner` in A1111's
modules/sd_samplers_common.py.)
"""

__all__ = ["switch_step"]

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.runtime.diffusion.schedules import Schedule

_LAST, _THOUSAND = np.float32(999), np.float32(1000)


def switch_step(schedule: Schedule, at: float | None, *, begin: int = 0, by_steps: bool = False) -> int:
    """Return the first step of `schedule` that the refiner takes for ``refiner_switch_at``; its length for never.

    `begin` is the first step of the run. None changes before the first one, as 0 does. A sampler that calls the model
    twice in a step may change within one in A1111; this is the step after it.
    """
    if at is None:
        return begin
    if by_steps:
        steps = schedule.steps - begin
        share = np.arange(steps) / steps
        late = share >= at
    else:
        # In float32, as in torch: at equal thousandths the rounding decides.
        late = _completed(schedule.sigmas[begin:-1], schedule.training) >= np.float32(at)
    return begin + (int(np.argmax(late)) if late.any() else len(late))


def _completed(sigmas: NDArray[np.float32], training: NDArray[np.float32]) -> NDArray[np.float32]:
    nearest = np.abs(training.astype(np.float32)[None] - sigmas[:, None]).argmin(axis=1)
    done: NDArray[np.float32] = (_LAST - nearest.astype(np.float32)) / _THOUSAND
    return done
