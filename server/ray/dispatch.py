"""Whose turn it is when several devices draw, and when everything would be drawn: no threads, no clock."""

__all__ = ["Dispatch"]

from collections.abc import Callable, Iterable, Iterator

from sdxl_trt.server.desk.plan import Cost, Scheduler, Task, Times
from sdxl_trt.server.ray.layout import Layout


class Dispatch(Scheduler):
    """The queue of an ingress: tasks wait here for their turn, and are `away` while a pool has them.

    Turns are those of the desk: deficit round robin between owners, and the earliest deadline for one owner.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.away: dict[Task, str] = {}
        """Tasks that have left the queue, each with where it is: base, handed_over, refiner."""

    def take(self, may: Callable[[Task], bool]) -> Task | None:
        """Take the task whose turn it is among those that `may` go now; it is away from then on."""
        task = next(self._fairness.order([each for each in self.waiting if may(each)]), None)
        if task is not None:
            self._fairness.charge(task)
            self.waiting.remove(task)
            self.away[task] = "base" if task.base_key is not None or task.alone else "refiner"
        return task

    def move(self, task: Task, place: str) -> None:
        """State where a task is now, if it is still away."""
        if task in self.away:
            self.away[task] = place

    def drop(self, task: Task) -> None:
        """Forget `task` wherever it is."""
        super().drop(task)
        self.away.pop(task, None)

    def busy(self) -> bool:
        """Return whether anything waits or is away."""
        return bool(self.waiting or self.away)

    def counts(self) -> dict[str, int]:
        """Return how many pictures are where: waiting, base, handed_over, refiner."""
        found = {"waiting": sum(task.pictures for task in self.waiting), "base": 0, "handed_over": 0, "refiner": 0}
        for task, place in self.away.items():
            found[place] += task.pictures
        return found

    def foreseen(self, times: Times, more: Iterable[Task] = ()) -> Iterator[tuple[Task, float]]:  # noqa: ARG002
        """Yield the waiting tasks, and `more`, in the order of their turns, each with the seconds until it is drawn."""
        costs = [self._left(task, place) for task, place in self.away.items()]
        fairness = self._fairness.copy()
        for task in fairness.order([*self.waiting, *more]):
            fairness.charge(task)
            costs.append(task.cost)
            # However many devices there are, a picture takes its own seconds.
            yield task, max(self._seconds(costs), task.cost.total)

    def remaining(self, times: Times) -> float:  # noqa: ARG002
        """Return the seconds until what is away is drawn."""
        return self._seconds([self._left(task, place) for task, place in self.away.items()])

    def drain(self, times: Times) -> float:  # noqa: ARG002
        """Return the seconds until everything that is known now is drawn."""
        away = [self._left(task, place) for task, place in self.away.items()]
        return self._seconds([*away, *(task.cost for task in self.waiting)])

    def _left(self, task: Task, place: str) -> Cost:
        cost = task.cost
        return cost if place == "base" else Cost(refiner=cost.refiner, decode=cost.decode)

    def _seconds(self, costs: list[Cost]) -> float:
        """Return how long the devices take for all `costs`: the slower pool decides."""
        layout = self.layout
        if not layout.split:
            return sum(cost.total for cost in costs) / layout.together
        before = sum(cost.encode + cost.base for cost in costs) / layout.base
        return max(before, sum(cost.refiner + cost.decode for cost in costs) / layout.refiner)
