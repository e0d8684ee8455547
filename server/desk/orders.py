"""What is asked of the desk, and what it tells: orders and events."""

__all__ = [
    "Api",
    "Drawn",
    "Ended",
    "Event",
    "Graph",
    "Order",
    "Outcome",
    "Stepped",
    "Waiting",
]

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.runtime import Picture, Request

Api = Literal["openai", "a1111", "comfyui"]
Outcome = Literal["done", "interrupted", "cancelled", "deadline", "failed"]


@dataclass(frozen=True)
class Graph:
    """A ComfyUI graph in the API format, and the private folder that holds its pictures under their names."""

    nodes: Mapping[str, Any]
    folder: Path


@dataclass(frozen=True)
class Order:
    """What a client asks to be drawn.

    `who` is the key's id, or the peer's address without keys: orders of one `who` share a turn in the queue, and only
    they may stop each other. `id` is unique among the orders that are alive. `deadline` is in seconds from now.
    `wants_estimates` asks for the estimates of the latents at each step, for previews; without `keeps_estimates` only
    the ticket's `progress` has the latest. With `own_noise` each picture is
    drawn as if it were alone, with seeds N, N+1, …, in ComfyUI's way too, in which a batch has one seed.
    """

    work: Request | Graph
    api: Api
    who: str
    id: str
    deadline: float | None = None
    wants_estimates: bool = False
    keeps_estimates: bool = True
    own_noise: bool = False

    @property
    def size(self) -> int:
        """Return the bytes of the pictures that it starts from or follows."""
        if not isinstance(self.work, Request):
            return 0
        given = (self.work.image, self.work.mask, *(control.picture for control in self.work.controls))
        return sum(np.asarray(getattr(each, "array", each)).nbytes for each in given if each is not None)


@dataclass(frozen=True)
class Waiting:
    """The order is `place` (1 is next) in the queue; it is drawn in about `seconds`."""

    place: int
    seconds: float


@dataclass(frozen=True)
class Stepped:
    """One unit of work is done: `index` of `total` in `stage` ("encode", "load", "base", "refiner", "decode", …).

    `first` is the index of the first picture concerned. `estimate` are the clean latents as they are now (n, c, h, w),
    a copy, where the order asked for them. `node` is the graph's node that works, "" for a request. `pictures` are
    concerned, and the unit took `seconds`.
    """

    stage: str
    index: int
    total: int
    first: int = 0
    estimate: NDArray[np.float32] | None = None
    node: str = ""
    pictures: int = 1
    seconds: float = 0.0


@dataclass(frozen=True)
class Drawn:
    """Picture `index` of the order is finished; `node` is the graph's output node, "" for a request.

    Decoding took `seconds`.
    """

    index: int
    picture: Picture
    node: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Ended:
    """The order has ended; nothing follows. `error` is set where the outcome is "failed"."""

    outcome: Outcome
    error: Exception | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds of waiting and of each stage: queue, encode, load, base, refiner, decode."""


Event = Waiting | Stepped | Drawn | Ended
