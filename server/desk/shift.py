"""A pipeline in service, and the change to another one that has drawn a picture for a test."""

__all__ = ["Shift", "proven", "quietly"]

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from sdxl_trt.server.desk.pieces import Piece
from sdxl_trt.server.desk.plan import Scheduler, Task
from sdxl_trt.server.desk.studio import Studio

log = logging.getLogger("sdxl_trt.server")


@dataclass(eq=False)
class Shift:
    """A pipeline, and what is to be drawn with it. `opened` is done once a picture was drawn with it."""

    studio: Studio
    scheduler: Scheduler
    pieces: dict[Task, Piece] = field(default_factory=dict)
    opened: Future[None] = field(default_factory=Future)
    owned: bool = False
    """Whether the pipeline is closed once nothing more is drawn with it."""
    cold: bool = False
    """Whether its engines were unloaded after its first picture, to make room for those of the shift before."""


def proven(old: Studio, make: Callable[[], Shift]) -> Shift:
    """Return the shift that `make` makes, which has drawn a picture for a test.

    The engines of the `old` one are unloaded before, unless its files are gone: then they could not be loaded again.
    """
    if old.is_stored():
        old.free()
    shift = make()
    try:
        shift.studio.probe()
    except BaseException:
        quietly(shift.studio.close)
        raise
    return shift


def quietly(do: Callable[[], None]) -> None:
    """Do what only gives memory back: an error of it is logged, and changes nothing."""
    try:
        do()
    except Exception as exc:  # noqa: BLE001 - what stays loaded is all that is lost
        log.warning("engines could not be unloaded: %s", type(exc).__name__)
