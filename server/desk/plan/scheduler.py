"""What runs next: cycles of all base phases, one change of UNets, all refiner phases, and the decoding.

Nothing here waits, draws or looks at a clock: `Scheduler` is told what came, what is done and what time it is, so that
a simulated clock can drive it. All times are seconds.
"""

__all__ = ["Scheduler"]

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from sdxl_trt.server.desk.plan.fairness import Fairness
from sdxl_trt.server.desk.plan.tasks import Action, Expert, Kind, Policy, Task, Times


@dataclass
class _Cycle:
    """Where the tasks of the current cycle are."""

    unread: list[Task] = field(default_factory=list)
    to_base: list[Task] = field(default_factory=list)
    handed: list[Task] = field(default_factory=list)
    finished: list[Task] = field(default_factory=list)
    phase: Expert = "base"
    began: float = 0.0
    handed_since: float = math.inf
    """When the first task was handed over."""

    def places(self) -> tuple[list[Task], ...]:
        return self.unread, self.to_base, self.handed, self.finished

    def seconds(self) -> float:
        """Return the predicted seconds of what is left, without changes of UNets."""
        left = sum(task.seconds for task in self.unread)
        left += sum(task.cost.base + task.cost.refiner + task.cost.decode for task in self.to_base)
        left += sum(task.cost.refiner + task.cost.decode for task in self.handed)
        return left + sum(task.cost.decode for task in self.finished)


class Scheduler:
    """Decides what runs next. Call `next`, do what it says, call `done`, and so on; `add` and `drop` at any time."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self.waiting: list[Task] = []
        """What no cycle has taken yet."""
        self.loaded: Expert | None = None
        self.cycles = 0
        self.swaps = 0
        """How often one UNet replaced the other."""
        self._fairness = Fairness()
        self._cycle = _Cycle()
        self._running: Action | None = None
        self._recent = 0.0
        self._latest = 0.0

    # ---------------------------------------------------------------- what comes and goes

    def add(self, task: Task, now: float) -> None:
        """Let `task` wait for a cycle."""
        self._decay(now)
        self._recent += task.pictures
        self.waiting.append(task)

    def again(self, task: Task) -> Task:
        """Let `task` wait once more, to run without company; return the task that stands for it."""
        once_more = replace(
            task,
            base_key=None if task.base_key is None else object(),
            refiner_key=None if task.refiner_key is None else object(),
        )
        self.waiting.insert(0, once_more)
        return once_more

    def drop(self, task: Task) -> None:
        """Forget `task` wherever it is; one that runs now is forgotten by `done`."""
        for place in (self.waiting, *self._cycle.places()):
            if task in place:
                place.remove(task)

    def busy(self) -> bool:
        """Return whether anything waits or runs."""
        return bool(self.waiting or self._running or any(self._cycle.places()))

    def between_cycles(self) -> bool:
        """Return whether nothing is under way: what waits has not begun."""
        return not (self._running or any(self._cycle.places()))

    def counts(self) -> dict[str, int]:
        """Return how many pictures are where: waiting, base, handed_over, refiner."""
        running = self._running.kind if self._running else ""
        here = sum(task.pictures for task in self._running.tasks) if self._running else 0
        cycle = self._cycle
        before = sum(task.pictures for task in (*cycle.unread, *cycle.to_base))
        handed = sum(task.pictures for task in cycle.handed)
        after = sum(task.pictures for task in cycle.finished)
        return {
            "waiting": sum(task.pictures for task in self.waiting),
            "base": before + here * (running in ("encode", "base", "alone")),
            "handed_over": handed,
            "refiner": after + here * (running in ("refiner", "decode")),
        }

    # ---------------------------------------------------------------- what runs next

    def next(self, now: float, times: Times) -> Action | None:
        """Return what to do now, None if there is nothing; `done` must be called before the next call."""
        self._running = self._step(now, times)
        if self._running is not None and self._running.expert not in (None, self.loaded):
            self.swaps += self.loaded is not None
            self.loaded = self._running.expert
        return self._running

    def done(self, now: float, survivors: Sequence[Task] | None = None) -> None:
        """State that the latest action is done for `survivors`, by default all its tasks; the others are gone."""
        action, self._running = self._running, None
        if action is None:
            return
        cycle = self._cycle
        for task in action.tasks if survivors is None else survivors:
            if action.kind == "encode":
                (cycle.to_base if task.base_key is not None else cycle.handed).append(task)
            elif action.kind == "base" and task.refiner_key is not None:
                cycle.handed.append(task)
                cycle.handed_since = min(cycle.handed_since, now)
            elif action.kind in ("base", "refiner"):
                cycle.finished.append(task)
        if action.kind == "alone":
            self.loaded = None

    def finish_early(self, task: Task) -> None:
        """Send `task` straight to the decoder, with what there is of it; it has run already."""
        self.drop(task)
        self._cycle.finished.append(task)

    def _step(self, now: float, times: Times) -> Action | None:
        cycle = self._cycle
        if cycle.phase == "base" and not cycle.unread and not cycle.to_base:
            early = cycle.finished and (times.decoder_stays or not cycle.handed)
            if not early and not self._extend(now, times):
                cycle.phase = "refiner"
        if cycle.unread:
            return self._reading()
        if cycle.to_base:
            group = self._group(cycle.to_base, "base")
            refined = cycle.handed or any(task.refiner_key is not None for task in group)
            return Action("base", group, "base", "base" if cycle.to_base else "refiner" if refined else None)
        if cycle.handed and cycle.phase == "refiner":
            group = self._group(cycle.handed, "refiner")
            return Action("refiner", group, "refiner", "refiner" if cycle.handed else None)
        if cycle.finished:
            return Action("decode", (cycle.finished.pop(0),))
        return self._open(now, times)

    def _reading(self) -> Action:
        tasks, self._cycle.unread = tuple(self._cycle.unread), []
        return Action("encode", tasks, following="base" if any(task.base_key for task in tasks) else "refiner")

    def _group(self, tasks: list[Task], expert: Expert) -> tuple[Task, ...]:
        """Take those of `tasks` that share calls with the first."""
        group: list[Task] = []
        for task in tasks:
            if not group or self._together(group, task, expert):
                group.append(task)
        for task in group:
            tasks.remove(task)
        return tuple(group)

    def _together(self, group: Sequence[Task], task: Task, expert: Expert) -> bool:
        if sum(each.pictures for each in group) + task.pictures > self.policy.pictures:
            return False
        return _key(group[0], expert) == _key(task, expert)

    # ---------------------------------------------------------------- who is admitted to a cycle

    def _open(self, now: float, times: Times) -> Action | None:
        """Begin a cycle with those whose turn it is."""
        self._cycle = _Cycle(began=now)
        if self.loaded == "refiner" and (not self.waiting or (times.swap and self._wants_base())):
            return Action("home", expert="base")  # before anybody is admitted: more may come meanwhile
        if not self.waiting:
            return None
        self.cycles += 1
        admitted = self._admitted(now, times)
        if admitted[0].alone:
            return Action("alone", (admitted[0],))
        self._cycle.unread = admitted
        return self._reading()

    def _wants_base(self) -> bool:
        return any(task.base_key is not None or task.alone for task in self.waiting)

    def _admitted(self, now: float, times: Times) -> list[Task]:
        admitted: list[Task] = []
        cap = self.cap(now, times)
        for task in self._turns(now, times):
            if admitted and not self._joins(admitted, task, now, times, cap):
                continue
            self._fairness.charge(task)
            admitted.append(task)
            if task.alone:
                break
        else:
            self._hurry(admitted, now, times)
        for task in admitted:
            self.waiting.remove(task)
        return admitted

    def _turns(self, now: float, times: Times) -> Iterator[Task]:
        """Yield what waits in the order of its turns, or of its arrival if somebody would wait too long otherwise."""
        order = self._fairness.order(self.waiting)
        first = next(order)
        oldest = min(self.waiting, key=lambda task: task.came)
        if not times.swap and not self._on_time([first], now):
            yield oldest
            yield from (task for task in self.waiting if task is not oldest)
        else:
            yield first
            yield from order

    def _on_time(self, chosen: Sequence[Task], now: float) -> bool:
        """Return whether the others, in the order in which they came, begin within W after those `chosen`."""
        now += sum(task.seconds for task in chosen)
        for task in sorted(self.waiting, key=lambda task: task.came):
            if task not in chosen:
                if now - task.came > self.policy.wait:
                    return False
                now += task.seconds
        return True

    def _hurry(self, admitted: list[Task], now: float, times: Times) -> None:
        """Admit beyond the cap those that would have waited longer than W when the cycle ends."""
        ends = now + 2 * times.swap + sum(task.seconds for task in admitted)
        for task in self.waiting:
            late = times.swap and task not in admitted and ends - task.came > self.policy.wait
            if late and self._joins(admitted, task, now, times, math.inf):
                self._fairness.charge(task)
                admitted.append(task)
                ends += task.seconds

    def _joins(self, admitted: list[Task], task: Task, now: float, times: Times, cap: float) -> bool:
        """Return whether `task` may be in a cycle with those `admitted`, which then misses no deadline for it."""
        if task.alone or sum(each.pictures for each in admitted) + task.pictures > cap:
            return False
        if times.swap == 0.0 and self.policy.capped:  # nothing is saved by a common change of UNets
            expert: Expert = "refiner" if admitted[0].base_key is None else "base"
            if not (self._together(admitted, task, expert) and self._on_time([*admitted, task], now)):
                return False
        before = 2 * times.swap + sum(each.seconds for each in admitted)
        after = before + task.seconds
        return after <= self.policy.wait and not _missed(admitted, now + before, now + after)

    def cap(self, now: float, times: Times) -> float:
        """Return how many pictures a cycle takes: 2k + 2 for the k that the load needs, at least one full call."""
        if not self.policy.capped:
            return math.inf
        each = sum(task.seconds for task in self.waiting) / max(sum(task.pictures for task in self.waiting), 1)
        load = self.load(now)
        if load * each >= 1.0:
            return math.inf
        return max(self.policy.pictures, math.ceil(2 * (2 * times.swap * load / (1.0 - load * each)) + 2))

    def load(self, now: float) -> float:
        """Return the pictures that came a second, lately."""
        self._decay(now)
        return self._recent / self.policy.memory

    def _decay(self, now: float) -> None:
        self._recent *= math.exp((self._latest - now) / self.policy.memory)
        self._latest = now

    def _extend(self, now: float, times: Times) -> bool:
        """Take one more group before the UNets change, if that costs those who wait less than it saves."""
        cycle = self._cycle
        if not self.policy.extended or not cycle.handed:
            return False
        more = self._next_group()
        if not (more and self._worth(more, now, times)):
            more = []
        for task in self.waiting:  # what needs the refiner alone rides along
            if task.base_key is None and not task.alone and self._bounded([*more, task], now, times):
                more.append(task)
        for task in more:
            self._fairness.charge(task)
            self.waiting.remove(task)
        cycle.unread = more
        return bool(more)

    def _next_group(self) -> list[Task]:
        group: list[Task] = []
        for task in self._fairness.copy().order(self.waiting):
            if task.alone or task.base_key is None:
                continue
            if not group or self._together(group, task, "base"):
                group.append(task)
        return group

    def _worth(self, group: Sequence[Task], now: float, times: Times) -> bool:
        """Return whether n·k'·b < 2S(k' + m): what the handed-over wait, against the changes that the others save."""
        handed = sum(task.pictures for task in self._cycle.handed)
        longer = sum(task.cost.encode + task.cost.base for task in group) + times.reload
        saved = 2 * times.swap * sum(task.pictures for task in self.waiting if not task.alone)
        return handed * longer < saved and self._bounded(group, now, times)

    def _bounded(self, more: Sequence[Task], now: float, times: Times) -> bool:
        """Return whether a cycle with `more` keeps the bound W and the deadlines of those handed over."""
        cycle = self._cycle
        if now - cycle.handed_since > self.policy.wait / 2:
            return False
        before = now + times.swap + cycle.seconds()
        after = before + times.reload + sum(task.seconds for task in more)
        oldest = min([cycle.began, *(task.came for task in self.waiting if task not in more)])
        if not times.swap and not self._on_time(more, before):
            return False
        return after + times.swap - oldest <= self.policy.wait and not _missed(cycle.handed, before, after)

    # ---------------------------------------------------------------- what is foreseen

    def foreseen(self, times: Times, more: Iterable[Task] = ()) -> Iterator[tuple[Task, float]]:
        """Yield the waiting tasks, and `more`, in the order of their turns, each with the seconds until it is drawn."""
        seconds = self.remaining(times) + 2 * times.swap
        fairness = self._fairness.copy()
        for task in fairness.order([*self.waiting, *more]):
            fairness.charge(task)
            seconds += task.cost.total
            yield task, seconds

    def remaining(self, times: Times) -> float:
        """Return the seconds until the current cycle is over."""
        cycle, running = self._cycle, self._running
        seconds = cycle.seconds()
        if running is not None:
            seconds += sum(_left(task, running.kind) for task in running.tasks)
        return seconds + times.swap * bool(cycle.phase == "base" and (cycle.handed or cycle.to_base))

    def in_time(self, task: Task, times: Times) -> bool:
        """Return whether `task` can wait here and begin within W, with everybody who waits already."""
        before = sum(each.seconds for each in self.waiting)
        if not times.swap:  # its turn comes after all of them; else all of them go into the next cycle
            return self.remaining(times) + before <= self.policy.wait
        return 2 * times.swap + before + task.cost.total <= self.policy.wait

    def drain(self, times: Times) -> float:
        """Return the seconds until everything that is known now is drawn."""
        waiting = sum(task.seconds for task in self.waiting)
        return self.remaining(times) + waiting + 2 * times.swap * bool(self.waiting)


def _key(task: Task, expert: Expert) -> Hashable:
    return task.base_key if expert == "base" else task.refiner_key


def _missed(tasks: Sequence[Task], before: float, after: float) -> bool:
    """Return whether one of `tasks` misses its deadline by ending at `after`, and would not by ending at `before`."""
    return any(before <= task.deadline < after for task in tasks)


def _left(task: Task, kind: Kind) -> float:
    cost = task.cost
    return {
        "encode": cost.total,
        "alone": cost.total,
        "base": cost.base + cost.refiner + cost.decode,
        "refiner": cost.refiner + cost.decode,
        "decode": cost.decode,
        "home": 0.0,
    }[kind]
