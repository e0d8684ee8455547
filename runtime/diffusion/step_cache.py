"""Step caching: the full UNet in every Nth step, and between them its outermost level alone, on extrapolated features.

Deep features change smoothly from step to step, and the levels that compute them take most of a UNet's time (DeepCache,
arXiv 2312.00858). DeepCache reuses those of the latest full step; here the line through the two latest is
followed, which is closer to what the full UNet would compute where nothing disturbs the way from one to the other.
"""

__all__ = ["CachePolicy", "StepCache", "reach_of"]

from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import numpy as np

from sdxl_trt.engines import Array, DeviceArray, Engine, Value
from sdxl_trt.engines.bundle import DEEP_FEATURE

NEW, OLD, FACTOR = "deep_new", "deep_old", "deep_factor"
"""What the shallow graph takes in its place: deep = new + (new - old) · factor."""


_REACH = dict.fromkeys(("euler", "ddim", "heun"), 1.0) | dict.fromkeys(
    ("dpmpp_2m", "res_multistep", "lms", "deis", "uni_pc", "uni_pc_bh2"), 0.5
)
"""How far the line is followed, where that is closer than the latest features: docs/caching.md has the measurement.

Multistep samplers extrapolate the estimates, and with them the errors of the features.
"""


def reach_of(sampler: str) -> float:
    """Return how much of the way along the line of deep features a cache follows with `sampler`.

    It is 0 for samplers that add noise or call the model in the middle of a step: their features lie on no line.
    """
    return _REACH.get(sampler, 0.0)


@dataclass(frozen=True)
class CachePolicy:
    """Which steps of a stage are full: the `first` ones, then every `every`th. Steps count from the stage's start.

    It does not depend on where the stage ends, so requests that differ only in that take the same steps. The others
    follow the line of deep features by `reach` of the way; 0 reuses the latest.
    """

    every: int
    first: int
    reach: float = 1.0

    def full(self, step: int) -> bool:
        """Return whether `step`, counted from 0, is full."""
        return step < self.first or (step - self.first + 1) % self.every == 0

    def full_steps(self, steps: int) -> int:
        """Return how many of `steps` are full."""
        return min(steps, self.first) + max(steps - self.first, 0) // self.every


class StepCache:
    """Answers the calls of one group of pictures through a stage: by `full` or by `shallow`, as `policy` says.

    Features are extrapolated along sigma, or what `coordinate` maps it to. All calls of a step are of one kind. If the
    rows of a call are others than before, what was kept is of other pictures: it is dropped, and the rest of the step
    is full. The features of one sigma alone are used as they are.

    Features stay on the device. The engine keeps those of its two latest calls that keep any, so nothing else may have
    it keep some until the stage ends.
    """

    def __init__(
        self, full: Engine, shallow: Engine, policy: CachePolicy, coordinate: Callable[[float], float] = float
    ) -> None:
        self._full, self._shallow = full, shallow
        self._policy = policy
        self._coordinate = coordinate
        self._takes = {spec.name for spec in shallow.component.inputs}
        self._kept: deque[tuple[float, DeviceArray]] = deque(maxlen=2)
        self._rows: Hashable = None
        self._step = 0
        self._is_full = policy.full(0)
        self._full_steps = 0

    def bind(self, constants: Mapping[str, Array]) -> None:
        """Set the inputs that stay constant, as `Engine.bind` does."""
        self._full.bind(constants)
        self._shallow.bind({name: value for name, value in constants.items() if name in self._takes})

    def infer(self, given: Mapping[str, Value], sigma: float, rows: Hashable) -> Array:
        """Return the UNet's answer to the inputs `given`, whose latents have noise of deviation `sigma`.

        `rows` says what the rows stand for: features are of use as long as it stays equal.
        """
        if rows != self._rows:
            self._kept.clear()
            self._rows = rows
        at = self._coordinate(sigma)
        if self._is_full or not self._kept:
            self._is_full = True
            return self._keeping(given, at)
        return self._extrapolated(given, at)

    def end_step(self) -> int:
        """Go on to the next step: the calls so far were those of one. Return how many steps so far were full."""
        self._full_steps += self._is_full
        self._step += 1
        self._is_full = self._policy.full(self._step)
        return self._full_steps

    def _keeping(self, given: Mapping[str, Value], at: float) -> Array:
        if self._policy.reach and self._kept and self._kept[-1][0] == at:  # a line needs another point: the first stays
            return self._full.infer(given, ["out_sample"])["out_sample"]
        answers, kept = self._full.infer_keeping(given, [DEEP_FEATURE], ["out_sample"])
        self._kept.append((at, kept[DEEP_FEATURE]))
        return answers["out_sample"]

    def _extrapolated(self, given: Mapping[str, Value], at: float) -> Array:
        (before, old), (latest, new) = self._kept[0], self._kept[-1]
        factor = 0.0
        if self._policy.reach and len(self._kept) == 2:
            factor = self._policy.reach * (at - latest) / (latest - before)
        deep: dict[str, Value] = {NEW: new, OLD: old, FACTOR: np.full(new.shape[0], factor, np.float32)}
        taken = {name: value for name, value in given.items() if name in self._takes}
        return self._shallow.infer(taken | deep, ["out_sample"])["out_sample"]
