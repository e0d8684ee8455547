"""A clock that is only counted: arrivals and a scheduler, without threads, engines or waiting."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sdxl_trt.server.desk.scheduler import Action, Cost, Scheduler, Task, Times


@dataclass
class Result:
    """What became of the tasks: seconds from arrival to the base phase, and to the picture."""

    waits: dict[Task, float] = field(default_factory=dict)
    latencies: dict[Task, float] = field(default_factory=dict)
    refused: list[Task] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    cycle_seconds: list[float] = field(default_factory=list)

    @property
    def latency(self) -> float:
        return sum(self.latencies.values()) / len(self.latencies)


def simulate(
    scheduler: Scheduler,
    tasks: Sequence[Task],
    times: Times,
    admit: Callable[[Task, float], bool] = lambda task, now: True,
) -> Result:
    """Run `tasks`, sorted by arrival, until all are drawn; `admit` may refuse one when it comes."""
    result, now, loaded, coming = Result(), 0.0, "base", 0
    scheduler.loaded = "base"
    began = math.nan
    while True:
        while coming < len(tasks) and tasks[coming].came <= now:
            task = tasks[coming]
            coming += 1
            if admit(task, task.came):
                scheduler.add(task, task.came)
            else:
                result.refused.append(task)
        cycles = scheduler.cycles
        action = scheduler.next(now, times)
        if scheduler.cycles > cycles:
            if not math.isnan(began):
                result.cycle_seconds.append(now - began)
            began = now
        if action is None:
            if coming == len(tasks):
                return result
            now, began = tasks[coming].came, math.nan
            continue
        result.actions.append(action)
        if action.expert not in (None, loaded):
            loaded, now = action.expert, now + times.swap
        for task in action.tasks:
            if action.kind == "encode":
                result.waits[task] = now - task.came
        now += sum(_seconds(task.cost, action.kind) for task in action.tasks)
        # What came during the action waits before the scheduler is asked again.
        while coming < len(tasks) and tasks[coming].came <= now:
            task = tasks[coming]
            coming += 1
            if admit(task, task.came):
                scheduler.add(task, task.came)
            else:
                result.refused.append(task)
        for task in action.tasks:
            if action.kind in ("decode", "alone"):
                result.latencies[task] = now - task.came
        scheduler.done(now)


def _seconds(cost: Cost, kind: str) -> float:
    return cost.total if kind == "alone" else getattr(cost, kind)


COST = Cost(encode=0.01, base=1.04, refiner=0.32, decode=0.1)
"""The example of the formulas: c = 1.47 s."""


def poisson(rate: float, count: int, seed: int, **changes: object) -> list[Task]:
    """Return `count` tasks of one key that come at random, `rate` a second."""
    rng, now, tasks = random.Random(seed), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        given = {"who": "a", "cost": COST, "came": now, "base_key": "k", "refiner_key": "k", **changes}
        tasks.append(Task(**given))  # type: ignore[arg-type]
    return tasks


def predicted_latency(rate: float, swap: float, cost: Cost = COST) -> float:
    """Return the mean latency of a gated service in cycles of 2S + ck, by the textbook formula."""
    c, d, rho = cost.total, cost.decode, rate * cost.total
    cycle = 2 * swap / (1 - rho)
    own = 1 + rate * cycle + rho**2 / (1 - rho**2)
    return cycle / 2 + c * rho / (2 * (1 - rho**2)) + own * (c - d / 2) + swap + d / 2
