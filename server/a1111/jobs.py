"""The orders of this API that are in work, and how far each is: what progress, interrupt and skip are about."""

__all__ = ["Job", "Jobs", "progress_told", "task_told"]

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.server.desk import Drawn, Event, Stepped, Ticket

MOST_KEPT = 256
"""The finished tasks that are remembered, so that their clients hear that they are completed."""
Shown = Callable[[NDArray[np.float32]], str]
"""Returns a preview of estimated latents as base64."""


@dataclass(eq=False)
class Job:
    """An order that is in work: `steps` are those of each of its `pictures`; `who` may watch and stop it."""

    ticket: Ticket
    who: str
    pictures: int
    steps: int
    id_task: str = ""
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    done: int = 0
    drawn: int = 0
    step: int = 0
    """The steps of the picture that was worked on last."""
    _each: dict[int, int] = field(default_factory=dict)

    def saw(self, event: Event) -> None:
        """Take in what the desk tells."""
        if isinstance(event, Drawn):
            self.drawn += 1
        elif isinstance(event, Stepped) and event.stage in ("base", "refiner"):
            self.done += 1
            self._each[event.first] = self.step = self._each.get(event.first, 0) + 1

    @property
    def begun(self) -> bool:
        """Return whether the worker has begun with it."""
        return self.ticket.started is not None

    @property
    def share(self) -> float:
        """Return how much of it is done, from 0 to 1; decoding counts as one more step of each picture."""
        return min((self.done + self.drawn) / (self.pictures * (self.steps + 1)), 1.0)

    @property
    def eta(self) -> float:
        """Return the predicted seconds until it ends."""
        if self.ticket.started is None or not self.share:
            return 0.0 if self.ticket.place is None else self.ticket.place.seconds
        return (time.monotonic() - self.ticket.started) * (1.0 / self.share - 1.0)

    @property
    def estimate(self) -> NDArray[np.float32] | None:
        """Return the latents (c, h, w) of the picture that was worked on last, as they are estimated."""
        progress = self.ticket.progress
        return None if progress is None or progress.estimate is None else progress.estimate[0]


class Jobs:
    """The jobs of all clients. Used on one event loop."""

    def __init__(self) -> None:
        self._alive: list[Job] = []
        self._finished: OrderedDict[tuple[str, str], None] = OrderedDict()

    def add(self, job: Job) -> None:
        """Take a job in."""
        self._alive.append(job)

    def end(self, job: Job) -> None:
        """Forget a job; its task counts as completed."""
        self._alive.remove(job)
        if job.id_task:
            self._finished[job.who, job.id_task] = None
            while len(self._finished) > MOST_KEPT:
                self._finished.popitem(last=False)

    def of(self, who: str) -> list[Job]:
        """Return a client's jobs, those that the worker has begun with first, else in the order in which they came."""
        return sorted((job for job in self._alive if job.who == who), key=lambda job: not job.begun)

    def everyones(self) -> Iterator[Job]:
        """Yield all jobs."""
        return iter([*self._alive])

    def is_finished(self, who: str, id_task: str) -> bool:
        """Return whether a client's task was completed a while ago."""
        return (who, id_task) in self._finished


def progress_told(job: Job | None, shown: Shown | None) -> dict[str, Any]:
    """Return what /progress says of a client's job; None is idle, which clients know by 0.0 and job_count 0."""
    estimate = job.estimate if job is not None else None
    stopped = job is not None and job.ticket.stop == "interrupted"
    state = {
        "skipped": False,
        "interrupted": stopped,
        "stopping_generation": False,
        "job": "" if job is None else f"Batch {min(job.drawn + 1, job.pictures)} out of {job.pictures}",
        "job_count": 0 if job is None else job.pictures,
        "job_timestamp": "0" if job is None else job.started.strftime("%Y%m%d%H%M%S"),
        "job_no": 0 if job is None else job.drawn,
        "sampling_step": 0 if job is None else job.step,
        "sampling_steps": 0 if job is None else job.steps,
    }
    return {
        "progress": 0.0 if job is None else job.share,
        "eta_relative": 0.0 if job is None else job.eta,
        "state": state,
        "current_image": None if shown is None or estimate is None else shown(estimate),
        "textinfo": None if job is None or job.begun else _place(job),
    }


def task_told(job: Job | None, *, completed: bool, shown: Shown | None, known: int) -> dict[str, Any]:
    """Return what /internal/progress says of a task; `known` is the number of the preview that the client has."""
    begun = job is not None and job.begun
    number = -1 if job is None else job.done
    estimate = None if job is None else job.estimate
    fresh = shown is not None and estimate is not None and number != known
    return {
        "active": begun,
        "queued": job is not None and not begun,
        "completed": completed,
        "progress": job.share if job is not None and begun else None,
        "eta": job.eta if job is not None and begun else None,
        "live_preview": f"data:image/png;base64,{shown(estimate)}" if fresh else None,  # type: ignore[misc, arg-type]
        "id_live_preview": number if fresh else known,
        "textinfo": "Waiting..." if job is None else None if begun else _place(job),
    }


def _place(job: Job) -> str:
    return "Waiting..." if job.ticket.place is None else f"In queue: {job.ticket.place.place}"
