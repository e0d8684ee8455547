"""Which devices draw what: every device with both experts, or some with the base and others with the refiner.

The rule compares pictures a second. With g devices that hold both experts and change them twice for k pictures,
X = g·k / (2S + c·k). With g_b devices for the base and g_r for the refiner, X = min(g_b / b, g_r / (r + d)).
e, b, r and d are the seconds of a picture for encoding, base, refiner and decoding, c their sum, S those of one change.
"""

__all__ = ["ASSUMED", "Layout", "LayoutName", "Seconds", "choose_layout", "parse_seconds"]

import math
from dataclasses import dataclass
from typing import Literal

from sdxl_trt.engines import UsageError

LayoutName = Literal["auto", "split", "together"]


@dataclass(frozen=True)
class Seconds:
    """What one picture takes: encoding (e), base steps (b), refiner steps (r), decoding (d); and a change of UNets (S).

    A `swap` of 0 says that both UNets fit on a device beside each other.
    """

    base: float
    refiner: float
    decode: float
    swap: float
    encode: float = 0.01

    @property
    def picture(self) -> float:
        """Return the seconds of a picture without changes of UNets."""
        return self.encode + self.base + self.refiner + self.decode


ASSUMED = Seconds(base=1.04, refiner=0.32, decode=0.1, swap=0.2)
"""23 + 7 steps and a change of 0.2 s: an assumption, measured on no device."""


@dataclass(frozen=True)
class Layout:
    """How many devices hold the base alone, the refiner alone, or (`together`) both; and the pictures a second."""

    base: int
    refiner: int
    together: int
    rate: float
    reason: str

    @property
    def split(self) -> bool:
        """Return whether base and refiner have devices of their own."""
        return self.together == 0

    @property
    def devices(self) -> int:
        """Return the number of devices."""
        return self.base + self.refiner + self.together

    def line(self) -> str:
        """Return what is said at the start: the choice, and why."""
        what = f"{self.base} base + {self.refiner} refiner" if self.split else f"{self.together} with both experts"
        return f"ray: {self.devices} {'device' if self.devices == 1 else 'devices'}: {what}; {self.reason}"


def choose_layout(
    name: LayoutName, devices: int, seconds: Seconds, pictures: int, *, refined: bool = True, assumed: bool = False
) -> Layout:
    """Return the layout of so many `devices` for cycles of `pictures` (k).

    `refined` says whether the bundle has a refiner, `assumed` that `seconds` are not measured. Raises UsageError for a
    split that has too few devices, or no refiner.
    """
    if devices < 1:
        raise UsageError(f"--ray-devices {devices}: there is nothing to draw with; give at least 1")
    if name == "split" and (devices < 2 or not refined):
        missing = f"{devices} device is too few" if refined else "the bundle has no refiner"
        raise UsageError(f"--ray-layout split: {missing}; use --ray-layout together")
    together = devices * pictures / (2 * seconds.swap * refined + seconds.picture * pictures)
    if devices < 2 or not refined:
        return Layout(0, 0, devices, together, "both on one device" if refined else "the bundle has no refiner")
    base = _best_base(devices, seconds)
    split = _split_rate(base, devices - base, seconds)
    chosen = name == "split" or (name == "auto" and split > together)
    said = (f"{'asked for; ' if name != 'auto' else ''}{together:.3g} pictures/s together, {split:.3g} split"
            f"{' by assumed seconds; --ray-seconds states measured ones' if assumed else ''}")  # fmt: skip
    if chosen:
        return Layout(base, devices - base, 0, split, said)
    return Layout(0, 0, devices, together, said)


def _split_rate(base: int, refiner: int, seconds: Seconds) -> float:
    slowest = [(base, seconds.base), (refiner, seconds.refiner + seconds.decode)]
    return min(devices / each if each else math.inf for devices, each in slowest)


def _best_base(devices: int, seconds: Seconds) -> int:
    """Return how many of `devices` hold the base in the best split; fewer where two are equal."""
    return max(range(1, devices), key=lambda base: (_split_rate(base, devices - base, seconds), -base))


def parse_seconds(text: str) -> Seconds:
    """Return what ``BASE,REFINER,DECODE,SWAP`` states. Raises UsageError."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != 4 or not all(0 <= value < 1e6 for value in values) or not values[0] > 0:
        raise UsageError(f"{text!r} is not BASE,REFINER,DECODE,SWAP; give seconds of a picture, like 1.04,0.32,0.1,0.2")
    return Seconds(*values)
