"""An order in pieces: what is scheduled, usually a picture each, so that no order holds a phase."""

__all__ = ["Piece", "pieces_of", "work_of"]

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.runtime import Request
from sdxl_trt.runtime.pipeline import Job, share_key
from sdxl_trt.runtime.request import ResolvedRequest, StageName
from sdxl_trt.server.desk.plan import Predictor, Task, Work
from sdxl_trt.server.desk.ticket import Ticket

MAX_SEED = 2**64 - 1


@dataclass(eq=False)
class Piece:
    """Some pictures of an order, from `first` on, and how far they are. `request` None is a graph.

    `estimate` are their clean latents (n, c, h, w) as they were after the latest step, for who interrupts.
    """

    ticket: Ticket
    task: Task
    request: Request | None = None
    work: Work | None = None
    first: int = 0
    job: Job | None = None
    estimate: NDArray[np.float32] | None = None
    solo: bool = False
    """Whether it runs without company, since it failed in company."""
    complete: bool = False
    """Whether it has taken all its steps, and is only to be decoded."""
    early: bool = False
    """Whether its estimate is decoded, since somebody interrupted it."""

    @property
    def stopped(self) -> bool:
        """Return whether nobody waits for its last step any more."""
        return self.ticket.stop is not None or self.ticket.ended is not None


def pieces_of(ticket: Ticket, resolved: ResolvedRequest, predictor: Predictor, deadline: float) -> list[Piece]:
    """Return the pieces of a request; `deadline` is a point of `time.monotonic`."""
    return [
        _piece(ticket, request, first, resolved, predictor, deadline)
        for first, request in _parts(ticket.order.work, resolved, own_noise=ticket.order.own_noise)
    ]


def work_of(resolved: ResolvedRequest, pictures: int) -> Work:
    """Return what `pictures` of a request ask for."""
    refiner = resolved.refiner.steps if resolved.refiner is not None else 0
    base, shallow = _base_steps(resolved), _shallow_steps
    return Work(resolved.height * resolved.width, pictures, base, refiner, shallow(resolved, "base", base),
                shallow(resolved, "refiner", refiner))  # fmt: skip


def _base_steps(resolved: ResolvedRequest) -> int:
    return 0 if resolved.refiner_only else resolved.base.steps


def _shallow_steps(resolved: ResolvedRequest, stage: StageName, steps: int) -> int:
    """Return how many of a stage's steps a cache leaves to the shallow UNet.

    Where guidance or a ControlNet begins or ends, a step or two more are full.
    """
    policy = resolved.cache_of(stage)
    return 0 if policy is None else steps - policy.full_steps(steps)


def _parts(request: object, resolved: ResolvedRequest, *, own_noise: bool) -> Iterator[tuple[int, Request]]:
    """Yield (first picture, request): one for each seed if its noise does not depend on the others."""
    assert isinstance(request, Request)  # noqa: S101 - a graph has one piece
    seeds, second = resolved.seeds, resolved.refiner_seeds
    batch = resolved.comfyui and not own_noise
    if len(seeds) == 1 or batch or request.latents is not None:
        yield 0, replace(request, seed=seeds[0])
        return
    if resolved.comfyui:
        seeds = tuple((seeds[0] + number) & MAX_SEED for number in range(len(seeds)))
    for first, seed in enumerate(seeds):
        yield first, replace(request, seed=seed, count=1, refiner_seed=None if second is None else second[first])


def _piece(
    ticket: Ticket, request: Request, first: int, resolved: ResolvedRequest, predictor: Predictor, deadline: float
) -> Piece:
    pictures = len(resolved.seeds) if request.count != 1 else 1
    work = work_of(resolved, pictures)
    task = Task(
        ticket.order.who,
        predictor.cost(work),
        ticket.created,
        _key(resolved, "base") if work.base else None,
        _key(resolved, "refiner") if resolved.uses_refiner else None,
        deadline,
        pictures,
    )
    return Piece(ticket, task, request, work, first)


def _key(resolved: ResolvedRequest, stage: StageName) -> Hashable:
    """Return what pieces that share calls have in common; nothing has it in common with one that runs alone."""
    key = share_key(resolved, stage)
    return object() if key is None else key
