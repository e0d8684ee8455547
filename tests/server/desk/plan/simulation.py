"""A clock that is only counted: arrivals and a scheduler, without threads, engines or waiting."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sdxl_trt.server.desk.plan.scheduler import Scheduler
from sdxl_trt.server.desk.plan.tasks import Action, Cost, Task, Times


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


Admit = Callable[[Scheduler, Task], bool]


def simulate(
    scheduler: Scheduler, tasks: Sequence[Task], times: Times, admit: Admit = lambda scheduler, task: True
) -> Result:
    """Run `tasks`, sorted by arrival, until all are drawn; `admit` may refuse one when it comes."""
    return _Simulation(scheduler, list(tasks), times, admit).run()


class _Simulation:
    def __init__(self, scheduler: Scheduler, tasks: list[Task], times: Times, admit: Admit) -> None:
        self.scheduler, self.times, self.admit = scheduler, times, admit
        self.coming = tasks[::-1]
        self.result, self.now, self.began, self.loaded = Result(), 0.0, math.nan, "base"
        scheduler.loaded = "base"

    def run(self) -> Result:
        while True:
            self.arrive()
            cycles = self.scheduler.cycles
            action = self.scheduler.next(self.now, self.times)
            if self.scheduler.cycles > cycles:
                self.ended_cycle()
                self.began = self.now
            if action is not None:
                self.act(action)
            elif self.coming:
                self.ended_cycle()
                self.now, self.began = self.coming[-1].came, math.nan
            else:
                return self.result

    def ended_cycle(self) -> None:
        if not math.isnan(self.began):
            self.result.cycle_seconds.append(self.now - self.began)

    def arrive(self) -> None:
        """Let come what came by now."""
        while self.coming and self.coming[-1].came <= self.now:
            task = self.coming.pop()
            if self.admit(self.scheduler, task):
                self.scheduler.add(task, task.came)
            else:
                self.result.refused.append(task)

    def act(self, action: Action) -> None:
        result = self.result
        result.actions.append(action)
        if action.expert not in (None, self.loaded):
            self.loaded, self.now = str(action.expert), self.now + self.times.swap
        if action.kind == "encode":
            result.waits |= {task: self.now - task.came for task in action.tasks}
        self.now += sum(_seconds(task.cost, action.kind) for task in action.tasks)
        self.arrive()  # what came during the action waits before the scheduler is asked again
        if action.kind in ("decode", "alone"):
            result.latencies |= {task: self.now - task.came for task in action.tasks}
        self.scheduler.done(self.now)


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
