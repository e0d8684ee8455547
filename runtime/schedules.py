"""diffusers' grids: which timesteps and sigmas each of its scheduler classes visits."""

__all__ = ["FAMILIES", "SPACINGS", "TRANSFORMS", "Family", "diffusers_grid", "parse_schedule"]

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.sigma_spans import beta, exponential, karras
from sdxl_trt.runtime.training_sigmas import Table, fractional_timesteps

Values = NDArray[np.float64]

SPACINGS = ("leading", "trailing", "linspace")
TRANSFORMS: dict[str, Callable[[float, float, int], Values]] = {
    "karras": karras,
    "exponential": exponential,
    "beta": beta,
    # diffusers' lambdas are log sigmas, so that its grid "uniform in lambda" is the exponential one.
    "lu": exponential,
}
LCM_STEPS = 50
"""The steps of the solver that latent consistency models are distilled from."""


@dataclass(frozen=True)
class Family:
    """How a group of diffusers' scheduler classes makes its grid.

    `spare` timesteps are spaced in addition and left out at the low end. `whole` timesteps are integers: those of
    `rounded` transforms are rounded, others cut. A transform goes over the spaced ends, or the `full_range`.
    The last sigma is 0, or the training's lowest where the grid `ends_low`. The latents of a `variance_preserving`
    class start with unit variance, and where it ends low they are left in its scale.
    """

    spare: int = 0
    whole: bool = False
    rounded: frozenset[str] = frozenset()
    full_range: bool = False
    ends_low: bool = False
    variance_preserving: bool = False
    distilled: bool = False


EULER = Family()
KDPM2 = replace(EULER, rounded=frozenset({"karras"}))
DDIM = Family(whole=True, rounded=frozenset(TRANSFORMS), ends_low=True, variance_preserving=True)
MULTISTEP = Family(
    spare=1, whole=True, rounded=frozenset({"karras", "lu"}), full_range=True, variance_preserving=True
)  # fmt: skip
DEIS = replace(MULTISTEP, ends_low=True)
LCM = Family(whole=True, variance_preserving=True, distilled=True)

FAMILIES: dict[str, Family] = {
    "euler": EULER,
    "euler_ancestral": EULER,
    "heun": EULER,
    "lms": EULER,
    "dpmpp_sde": EULER,
    "dpm_2": KDPM2,
    "dpm_2_ancestral": KDPM2,
    "dpmpp_2m": MULTISTEP,
    "dpmpp_2m_sde": MULTISTEP,
    "dpmpp_3m_sde": MULTISTEP,
    "uni_pc": MULTISTEP,
    "deis": DEIS,
    "ddim": DDIM,
    "lcm": LCM,
    # Not in diffusers: they take Euler's.
    "dpmpp_2s_ancestral": EULER,
    "res_multistep": EULER,
}
"""The grid of each sampler. Transforms that a class does not have (EulerAncestral, DDIM: any; all but
DPMSolverMultistep: lu) are made as Euler's are."""


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
    family: Family, spacing: str, transform: str, steps: int, training: Table, offset: int
) -> tuple[Values, Values]:
    """Return `steps` timesteps and steps + 1 sigmas, both falling; `transform` "" leaves the spacing as it is.

    `training` is the table of sigmas, `offset` what `leading` adds to its timesteps. Raises UsageError for a number
    of steps, a spacing or a transform that cannot be.
    """
    timesteps = _spaced(family, spacing, steps, len(training), offset)
    sigmas = np.interp(timesteps, np.arange(len(training)), training)
    if transform and family.distilled:
        raise UsageError(f"--schedule +{transform}: lcm runs on the timesteps of its distillation; leave it out")
    if transform:
        ends = (training[-1], training[0]) if family.full_range else (sigmas[0], sigmas[-1])
        sigmas = TRANSFORMS[transform](float(ends[0]), float(ends[1]), steps)
        timesteps = fractional_timesteps(sigmas, training)
        timesteps = np.round(timesteps) if transform in family.rounded else timesteps
        timesteps = np.trunc(timesteps) if family.whole else timesteps
    return timesteps, np.append(sigmas, training[0] if family.ends_low else 0.0)


def _spaced(family: Family, spacing: str, steps: int, total: int, offset: int) -> Values:
    """Return the visited timesteps (table 2 of arXiv 2305.08891), from high noise to low."""
    if spacing not in SPACINGS:
        raise UsageError(f"timestep_spacing {spacing!r} is unknown; leading, trailing and linspace are known")
    most = min(LCM_STEPS, total) if family.distilled else total if spacing == "trailing" else total - family.spare
    if not 1 <= steps <= most:
        raise UsageError(f"--steps {steps}: choose 1 to {most}")
    if family.distilled:
        return _distilled(steps, total)
    if spacing == "trailing":
        return np.arange(total, 0, -total / steps).round()[:steps] - 1.0
    spaced = steps + family.spare
    if spacing == "leading":
        return np.arange(spaced, dtype=np.float64)[::-1][:steps] * (total // spaced) + offset
    timesteps = np.linspace(0, total - 1, spaced)[::-1][:steps]
    return np.round(timesteps) if family.whole else timesteps


def _distilled(steps: int, total: int) -> Values:
    """Return every so many-th of the solver's timesteps, from the highest on, as diffusers' LCMScheduler does."""
    solver = np.arange(LCM_STEPS, 0, -1) * (total // LCM_STEPS) - 1.0
    chosen = np.floor(np.linspace(0, LCM_STEPS, steps, endpoint=False)).astype(int)
    timesteps: Values = solver[chosen]
    return timesteps
