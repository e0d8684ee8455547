"""The ControlNets of a phase: their residuals for each step, which go to the UNet without leaving the device."""

__all__ = ["ControlNets", "ControlPart", "comfyui_span", "fraction_span"]

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import Array, DeviceArray, Engine, Value, numpy_dtype
from sdxl_trt.runtime.diffusion.conditioning import Conditions
from sdxl_trt.runtime.diffusion.schedules import Schedule

EARLIER = "earlier_"
"""The prefix of the inputs through which a ControlNet adds an earlier one's residuals to its own."""
Span = tuple[float, float]


@dataclass(frozen=True, eq=False)
class ControlPart:
    """One ControlNet of a phase: its picture (3, height, width), its scale on either side, and the sigmas it works at.

    It works at sigmas in (`above`, `up_to`]. With `guess` the residuals of finer levels count less, and the negative
    side has none.
    """

    engine: Engine
    picture: NDArray[np.float32]
    positive: float = 1.0
    negative: float = 1.0
    above: float = 0.0
    up_to: float = math.inf
    guess: bool = False

    def works(self, sigma: float, *, guided: bool) -> bool:
        """Return whether it changes anything at `sigma`."""
        counts = self.positive != 0 or (guided and self.negative != 0 and not self.guess)
        return counts and self.above < sigma <= self.up_to

    def scales(self, positives: int, rows: int) -> NDArray[np.float32]:
        """Return the factor of each residual in each of the `rows`, of which the first `positives` are positive."""
        count = len(self.engine.component.outputs)
        levels = np.logspace(-1, 0, count) if self.guess else np.ones(count)
        sides = np.full((rows, 1), 0.0 if self.guess else self.negative)
        sides[:positives] = self.positive
        scaled: NDArray[np.float32] = (sides * levels).astype(np.float32)
        return scaled


class ControlNets:
    """Binds the engines of `parts` to the conditions of a phase; their residuals are summed on the device."""

    def __init__(self, parts: Sequence[ControlPart], conditions: Conditions) -> None:
        self._parts = tuple(parts)
        rows = len(conditions.inputs["time_ids"])
        positives = rows * conditions.positives // (conditions.positives + conditions.negatives * conditions.guided)
        for part in self._parts:
            pictures = np.broadcast_to(part.picture, (rows, *part.picture.shape))
            given = {**conditions.inputs, "controlnet_cond": pictures, "scales": part.scales(positives, rows)}
            types = {name: numpy_dtype(part.engine.component.input(name)) for name in given}
            part.engine.bind({name: np.ascontiguousarray(array, types[name]) for name, array in given.items()})

    def working(self, sigma: float, *, guided: bool) -> tuple[bool, ...]:
        """Return for each ControlNet whether it changes anything at `sigma`."""
        return tuple(part.works(sigma, guided=guided) for part in self._parts)

    def residuals(self, sigma: float, sample: Array, timestep: Array, *, guided: bool) -> dict[str, DeviceArray]:
        """Return the UNet's inputs for a step at `sigma`, {} if no ControlNet works there.

        The rows of `sample` and `timestep` are the UNet's. The values are valid until the next call.
        """
        found: dict[str, DeviceArray] = {}
        for part in self._parts:
            if part.works(sigma, guided=guided):
                given: dict[str, Value] = {"sample": sample, "timestep": timestep}
                given |= {EARLIER + name: value for name, value in found.items()}
                found = part.engine.infer_on_device(given)
        return found


def fraction_span(sigmas: NDArray[np.float32], first: int, start: float, end: float) -> Span:
    """Return (above, up_to) of the sigmas at which a ControlNet works from fraction `start` to `end`, as in diffusers.

    The fractions are of the steps after `first` in (steps + 1,) `sigmas`, which base and refiner take together. Step i
    of n is taken with the ControlNet if start <= i / n and (i + 1) / n <= end.
    """
    count = len(sigmas) - 1 - first
    kept = [i for i in range(count) if not (i / count < start or (i + 1) / count > end)]
    if not kept:
        return 0.0, 0.0
    last = first + kept[-1] + 1
    up_to = math.inf if kept[0] == 0 else float(sigmas[first + kept[0]])
    return (float(sigmas[last]) if kept[-1] + 1 < count else -math.inf), up_to


def comfyui_span(schedule: Schedule, start: float, end: float) -> Span:
    """Return (above, up_to) for fractions of the training timesteps, as ComfyUI's nodes state them.

    ComfyUI includes both ends: `above` is the last number below the lower one.
    """
    lower = _percent_sigma(schedule, end)
    return math.nextafter(lower, -math.inf), _percent_sigma(schedule, start)


def _percent_sigma(schedule: Schedule, share: float) -> float:
    """Return ComfyUI's percent_to_sigma: interpolated in log sigma, unlimited at both ends."""
    if share <= 0.0:
        return math.inf
    if share >= 1.0 or schedule.logs is None:
        return 0.0
    timestep = np.float32((1.0 - share) * (schedule.num_train_timesteps - 1))
    low, high = math.floor(timestep), math.ceil(timestep)
    weight = timestep - np.float32(low)
    return float(np.exp((np.float32(1.0) - weight) * schedule.logs[low] + weight * schedule.logs[high]))
