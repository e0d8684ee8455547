"""What goes to a pool, and what comes back: an order with what to do of it, and the state between two experts."""

__all__ = ["Errand", "Handover", "Over", "Part", "Refused"]

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.runtime.pipeline import Job
from sdxl_trt.server.desk import Ended, Order

Part = Literal["all", "base", "refiner", "decode"]
"""All of an order; its base steps; its refiner steps and decoding; or the decoding of estimates."""


@dataclass(frozen=True)
class Handover:
    """What the base leaves: latents (count, c, h, w) in its sampler's scale, without new noise and not decoded.

    `state` is what the refiner needs beside them: its embeddings, the generators of noise, and what a mask keeps.
    """

    latents: NDArray[np.float32]
    state: Mapping[str, Any]

    @classmethod
    def of(cls, job: Job) -> "Handover":
        """Return what `job` leaves after its base steps; nothing in it is shared with the job."""
        embeds = {"refiner": job.embeds["refiner"]} if "refiner" in job.embeds else {}
        state = {"embeds": embeds, "noises": job.noises, "clean": job.clean, "kept_noise": job.kept_noise,
                 "kept_later": job.kept_later}  # fmt: skip
        return cls(job.latents.copy(), deepcopy(state))

    def give(self, job: Job) -> None:
        """Let `job`, which was started anew from the same request, go on where the base left it.

        Arrays that Ray delivers are read-only: what samplers and generators write to is copied.
        """
        job.latents = self.latents.copy()
        for name, value in self.state.items():
            setattr(job, name, deepcopy(value))


@dataclass(frozen=True)
class Errand(Order):
    """An order for a pool: `part` of it is done there.

    `handover` is what the base left, for "refiner"; `estimate` what is decoded, for "decode": clean latents. `files`
    are the contents of a graph's pictures by their names.
    """

    part: Part = "all"
    handover: Handover | None = None
    estimate: NDArray[np.float32] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Over:
    """The end of an errand: how it ended, what the base left of it, and what units of work take in that pool."""

    ended: Ended
    handover: Handover | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a step of a picture of its size (base, refiner, and shallow ones apart), of a prompt, of a decoded
    picture, if known."""


@dataclass(frozen=True)
class Refused:
    """The pool does not take the errand now: it warms up, stops, or fails."""

    reason: str
