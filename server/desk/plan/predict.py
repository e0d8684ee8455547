"""How long things take: averages of what was measured, and guesses before."""

__all__ = ["Predictor", "Work"]

import threading
from dataclasses import dataclass

from sdxl_trt.server.desk.plan.tasks import Cost, Expert

WEIGHT = 0.3
"""The share of the newest measurement in an average."""
MEGAPIXEL = 1 << 20
PRIORS = {"encode": 0.1, "base": 0.5, "refiner": 0.5, "decode": 1.0, "graph": 30.0}
"""Seconds for one step, one prompt, one picture to decode, each of a megapixel, and for one graph."""
SHALLOW = {"base_shallow": "base", "refiner_shallow": "refiner"}
"""The steps between the full ones of a step cache, and whose they are."""
SHALLOW_SHARE = 0.2
"""A shallow step's seconds beside a full one's, until one was measured: docs/caching.md says where it comes from."""
SIZED = ("base", "refiner", "decode", *SHALLOW)


@dataclass(frozen=True)
class Work:
    """What a piece of work asks for: the pixels of a picture, how many pictures, and the steps of each expert.

    `base_shallow` and `refiner_shallow` of these steps run the outermost level of a UNet alone.
    """

    pixels: int
    pictures: int
    base: int
    refiner: int
    base_shallow: int = 0
    refiner_shallow: int = 0


class Predictor:
    """Learns the seconds of each stage by size. It may be used by several threads.

    A size that was never drawn is taken from the nearest one that was, in proportion to its pixels.
    """

    def __init__(self) -> None:
        self._rates: dict[tuple[str, int], float] = {}
        self._loads: dict[str, float] = {}
        self._lock = threading.Lock()

    def observe(self, stage: str, pixels: int, seconds: float) -> None:
        """Take in that one unit of `stage` took `seconds`: a step of a picture, a prompt, a picture to decode.

        Shallow steps are units of "base_shallow" and "refiner_shallow", all others of "base" and "refiner".
        """
        key = (stage, pixels if stage in SIZED else 0)
        with self._lock:
            self._rates[key] = _average(self._rates.get(key), seconds)

    def observe_load(self, name: str, seconds: float) -> None:
        """Take in that loading the engines of a phase took `seconds`."""
        with self._lock:
            self._loads[name] = _average(self._loads.get(name), seconds)

    def unit(self, stage: str, pixels: int = 0) -> float:
        """Return the seconds of one unit of `stage`."""
        with self._lock:
            known = {size: rate for (name, size), rate in self._rates.items() if name == stage}
        if stage not in SIZED:
            return known.get(0, PRIORS[stage])
        if not known and stage in SHALLOW:
            return SHALLOW_SHARE * self.unit(SHALLOW[stage], pixels)
        if not known:
            return PRIORS[stage] * pixels / MEGAPIXEL
        nearest = min(known, key=lambda size: abs(size - pixels))
        return known[nearest] * pixels / nearest

    def cost(self, work: Work) -> Cost:
        """Return the predicted seconds of `work`."""
        return Cost(
            encode=self.unit("encode"),
            base=work.pictures * self._steps("base", work.base, work.base_shallow, work.pixels),
            refiner=work.pictures * self._steps("refiner", work.refiner, work.refiner_shallow, work.pixels),
            decode=work.pictures * self.unit("decode", work.pixels),
        )

    def _steps(self, stage: Expert, steps: int, shallow: int, pixels: int) -> float:
        """Return the seconds of `steps` steps of a picture, of which some are `shallow`."""
        full = (steps - shallow) * self.unit(stage, pixels)
        return full + shallow * self.unit(f"{stage}_shallow", pixels) if shallow else full

    def graph(self) -> Cost:
        """Return the predicted seconds of a graph, whatever it holds."""
        return Cost(base=self.unit("graph"))

    def swap(self) -> float:
        """Return half of what a cycle spends on loading: one change of UNets."""
        with self._lock:
            return sum(self._loads.values()) / 2


def _average(before: float | None, seconds: float) -> float:
    return seconds if before is None else (1 - WEIGHT) * before + WEIGHT * seconds
