"""What the scheduler plans with: tasks and what they cost, its policy, and what it says to do. Times are seconds."""

__all__ = ["Action", "Cost", "Expert", "Kind", "Policy", "Task", "Times"]

import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Expert = Literal["base", "refiner"]
Kind = Literal["encode", "base", "refiner", "decode", "alone", "home"]


@dataclass(frozen=True)
class Cost:
    """The predicted seconds of each stage."""

    encode: float = 0.0
    base: float = 0.0
    refiner: float = 0.0
    decode: float = 0.0

    @cached_property
    def total(self) -> float:
        """Return the seconds of all stages."""
        return self.encode + self.base + self.refiner + self.decode


@dataclass(frozen=True, eq=False)
class Task:
    """What is scheduled: usually one picture. `item` is the caller's, and not looked at.

    Tasks with equal keys of a stage may share the calls of its UNet; None has no step there. `alone` is work of a kind
    that the scheduler does not know, such as a graph: it runs when nothing else does.
    """

    who: str
    cost: Cost
    came: float
    base_key: Hashable | None
    refiner_key: Hashable | None
    deadline: float = math.inf
    pictures: int = 1
    alone: bool = False
    item: object = None

    @cached_property
    def seconds(self) -> float:
        """Return what it costs its owner."""
        return self.cost.total


@dataclass(frozen=True)
class Policy:
    """`wait` (W) bounds a cycle, so that what comes during it waits no longer for its base phase.

    `pictures` share a call at most. Without `capped` a cycle takes all that waits, without `extended` nothing joins a
    cycle that has begun: the gated service of the textbooks.
    """

    wait: float = 60.0
    pictures: int = 4
    capped: bool = True
    extended: bool = True
    memory: float = 60.0
    """Over how many seconds the load is averaged."""


@dataclass(frozen=True)
class Times:
    """What changes cost now: `swap` (S) one change of UNets, 0 if both stay loaded; `reload` what an encoder costs
    that is needed again in the middle of a phase. `decoder_stays` if decoding unloads no UNet."""

    swap: float = 0.0
    reload: float = 0.0
    decoder_stays: bool = True


@dataclass(frozen=True)
class Action:
    """One thing to do for `tasks`, which share the calls of a UNet in "base" and "refiner".

    "encode" reads the prompts of `tasks`, "decode" makes the picture of one, "alone" does all of one, and "home" loads
    the base again while nothing waits. `expert` is the UNet that is needed, None for any; `following` the next one.
    """

    kind: Kind
    tasks: tuple[Task, ...] = ()
    expert: Expert | None = None
    following: Expert | None = None
