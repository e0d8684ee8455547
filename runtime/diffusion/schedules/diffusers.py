"""diffusers' grids: which timesteps and sigmas each of its scheduler classes visits."""

__all__ = ["FAMILIES", "SPACINGS", "TRANSFORMS", "Family", "diffusers_grid", "edm_grid", "log_timesteps",
           "parse_schedule"]  # fmt: skip

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import Edm, Scheduler
from sdxl_trt.runtime.diffusion.schedules.curves import beta, exponential, karras
from sdxl_trt.runtime.diffusion.schedules.training import Table, fractional_timesteps

Values = NDArray[np.float64]

SPACINGS = ("leading", "trailing", "linspace")
TRANSFORMS: dict[str, Callable[[float, float, int], Values]] = {
    "karras": karras,
    "exponential": exponential,
    "beta": beta,
    # diffusers' lambdas are log sigmas, so its grid "uniform in lambda" is the exponential one.
    "lu": exponential,
}
CURVES = frozenset({"karras", "exponential", "beta"})
"""The transforms that most scheduler classes support."""


@dataclass(frozen=True)
class Family:
    """How a group of diffusers' scheduler classes makes its grid.

    `spare` extra timesteps are spaced and dropped at the low end. `whole` timesteps are integers: those of `rounded`
    transforms are rounded, others truncated. A transform covers the range of the spacing, or the `full_range` of the
    training. The class reads the config's flags for the transforms in `flags`, and its sigma_min and sigma_max for
    those in `bounded`. The last sigma is 0, or the training's lowest, as `ends` or the setting it names states. Latents
    of a `variance_preserving` class start with unit variance, and keep its scale if the grid ends above 0.
    """

    spare: int = 0
    whole: bool = False
    rounded: frozenset[str] = frozenset()
    full_range: bool = False
    flags: frozenset[str] = CURVES
    bounded: frozenset[str] = CURVES
    ends: Literal["zero", "low", "final_sigmas_type", "set_alpha_to_one"] = "zero"
    variance_preserving: bool = False
    distilled: bool = False

    def transform(self, scheduler: Scheduler) -> str:
        """Return the transform that the class reads from a config's flags, or ""."""
        return next((name for name in scheduler.transforms if name in self.flags), "")

    def ends_low(self, scheduler: Scheduler) -> bool:
        """Return whether the last sigma is the training's lowest, not 0."""
        if self.ends == "final_sigmas_type":
            return scheduler.final_sigmas_type == "sigma_min"
        return self.ends == "low" or (self.ends == "set_alpha_to_one" and not scheduler.set_alpha_to_one)


EULER = Family()
LMS = replace(EULER, bounded=CURVES - {"karras"})
KDPM2 = replace(EULER, rounded=frozenset({"karras"}))
DDIM = Family(
    whole=True, rounded=frozenset(TRANSFORMS), flags=frozenset(), ends="set_alpha_to_one", variance_preserving=True
)
MULTISTEP = Family(
    spare=1, whole=True, rounded=frozenset({"karras", "lu"}), full_range=True, variance_preserving=True
)  # fmt: skip
DPM = replace(MULTISTEP, flags=CURVES | {"lu"})
DEIS = replace(MULTISTEP, ends="low")
LCM = Family(whole=True, flags=frozenset(), variance_preserving=True, distilled=True)

FAMILIES: dict[str, Family] = {
    "euler": replace(EULER, ends="final_sigmas_type"),
    "euler_ancestral": replace(EULER, flags=frozenset()),
    "heun": EULER,
    "lms": LMS,
    "dpmpp_sde": LMS,
    "dpm_2": KDPM2,
    "dpm_2_ancestral": KDPM2,
    "dpmpp_2m": DPM,
    "dpmpp_2m_sde": DPM,
    "dpmpp_3m_sde": DPM,
    "uni_pc": MULTISTEP,
    "deis": DEIS,
    "ddim": DDIM,
    "lcm": LCM,
    # Not in diffusers: they use Euler's grid.
    "dpmpp_2s_ancestral": EULER,
    "res_multistep": EULER,
}
"""The grid of each sampler. A transform that a class does not support (EulerAncestral, DDIM: any; all but
DPMSolverMultistep: lu) is made as for Euler if it is requested; a config's flag for it is ignored."""


def parse_schedule(text: str) -> tuple[str, str]:
    """Return (spacing, transform) of ``SPACING``, ``TRANSFORM`` or ``SPACING+TRANSFORM``; "" for no transform.

    A bare transform means ``leading`` with it. Raises UsageError.
    """
    spacing, _, transform = text.partition("+")
    if spacing in TRANSFORMS and not transform:
        spacing, transform = "leading", spacing
    if spacing not in SPACINGS or (transform not in TRANSFORMS and text != spacing):
        raise UsageError(f"--schedule {text!r} is unknown; choose one of: {', '.join(SPACINGS)}, each also with"
                         f" {', '.join('+' + name for name in TRANSFORMS)}")  # fmt: skip
    return spacing, transform


def diffusers_grid(
    family: Family, spacing: str, transform: str, steps: int, training: Table, scheduler: Scheduler
) -> tuple[Values, Values]:
    """Return `steps` timesteps and steps + 1 sigmas, both falling; `transform` "" leaves the spacing as it is.

    `training` is the table of sigmas. Raises UsageError for an unsupported number of steps, spacing or transform.
    """
    if transform and family.distilled:
        raise UsageError(f"--schedule +{transform}: lcm runs on the timesteps of its distillation; leave it out")
    timesteps = _spaced(family, spacing, steps, scheduler)
    sigmas = np.interp(timesteps, np.arange(len(training)), training)
    if transform:
        high, low = (training[-1], training[0]) if family.full_range else (sigmas[0], sigmas[-1])
        if transform in family.bounded:
            high, low = scheduler.sigma_max or high, scheduler.sigma_min or low
        sigmas = TRANSFORMS[transform](float(high), float(low), steps)
        timesteps = fractional_timesteps(sigmas, training)
        timesteps = np.round(timesteps) if transform in family.rounded else timesteps
        timesteps = np.trunc(timesteps) if family.whole else timesteps
    return timesteps, np.append(sigmas, training[0] if family.ends_low(scheduler) else 0.0)


def edm_grid(edm: Edm, steps: int, *, ends_low: bool) -> Values:
    """Return the steps + 1 falling sigmas of diffusers' EDM classes. Raises UsageError for `steps` below 1."""
    if steps < 1:
        raise UsageError(f"--steps {steps}: choose 1 or more")
    high, low = edm.sigma_max, edm.sigma_min
    sigmas = exponential(high, low, steps) if edm.sigma_schedule == "exponential" else karras(high, low, steps, edm.rho)
    return np.append(sigmas, sigmas[-1] if ends_low else 0.0)


def log_timesteps(sigmas: NDArray[np.floating]) -> Values:
    """Return the timesteps of a model that receives log sigmas: log(sigma) / 4 (arXiv 2206.00364)."""
    timesteps: Values = 0.25 * np.log(sigmas.astype(np.float64))
    return timesteps


def _spaced(family: Family, spacing: str, steps: int, scheduler: Scheduler) -> Values:
    """Return the visited timesteps (table 2 of arXiv 2305.08891), from high noise to low."""
    if spacing not in SPACINGS:
        raise UsageError(f"timestep_spacing {spacing!r} is unknown; choose leading, trailing or linspace")
    total, solver = scheduler.num_train_timesteps, scheduler.original_inference_steps
    most = min(solver, total) if family.distilled else total if spacing == "trailing" else total - family.spare
    if not 1 <= steps <= most:
        raise UsageError(f"--steps {steps}: choose 1 to {most}")
    if family.distilled:
        return _distilled(steps, total, solver)
    if spacing == "trailing":
        return np.arange(total, 0, -total / steps).round()[:steps] - 1.0
    spaced = steps + family.spare
    if spacing == "leading":
        return np.arange(spaced, dtype=np.float64)[::-1][:steps] * (total // spaced) + scheduler.steps_offset
    timesteps = np.linspace(0, total - 1, spaced)[::-1][:steps]
    return np.round(timesteps) if family.whole else timesteps


def _distilled(steps: int, total: int, solver: int) -> Values:
    """Return `steps` evenly chosen timesteps of the distillation's solver, falling, as diffusers' LCMScheduler does."""
    known = np.arange(solver, 0, -1) * (total // solver) - 1.0
    chosen = np.floor(np.linspace(0, solver, steps, endpoint=False)).astype(int)
    timesteps: Values = known[chosen]
    return timesteps
