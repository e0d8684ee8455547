"""The data of a GPU estimate: the work, the floor of each part, the handoff, and published times."""

__all__ = ["Comparison", "Estimate", "HandoffEstimate", "PartEstimate", "Work"]

import msgspec

from sdxl_trt.benchmarks.roofline.flops import Counts
from sdxl_trt.benchmarks.roofline.gpus import Gpu
from sdxl_trt.benchmarks.roofline.published import Published, Rate


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """A batch of `batch` pictures of `height` × `width` pixels, in steps of the base and the refiner.

    `rows` are a UNet's rows per picture: 2 with guidance, 1 without. `tokens` are the prompt's, in chunks of 77.
    """

    base_steps: int
    refiner_steps: int
    height: int = 1024
    width: int = 1024
    batch: int = 1
    rows: int = 2
    tokens: int = 77


class PartEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """A graph's part of a picture: the cost of a call, and the least seconds per call.

    `compute` is its FLOPs at the peak rate, `memory` its least bytes at the peak bandwidth, `floor` the longer of the
    two. `traffic` is not a floor: the seconds if weights and the operands of every product go through memory.
    """

    name: str
    calls: int
    counts: Counts
    rate: Rate
    compute: float
    memory: float
    traffic: float
    floor: float


class HandoffEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """What the refiner saves or costs compared with the base alone, in seconds and bytes.

    `saved` is over all refiner steps. `load` is the time to copy the refiner's UNet from host memory at PCI Express's
    peak rate; `swap` adds reloading the base for the next batch. `steps_to_pay` is the number of refiner steps that
    save one swap, or None if no step saves time. `resident` is the bytes of all weights; `fits` if the GPU holds them.
    """

    base_step: float
    refiner_step: float
    saved: float
    load: float
    swap: float
    steps_to_pay: float | None
    resident: int
    fits: bool


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A published time, and the floor of the same work on the same GPU."""

    published: Published
    floor: float

    @property
    def share(self) -> float:
        """The floor as a fraction of the published time."""
        return self.floor / self.published.seconds


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """The floor of one batch of pictures on a GPU, by graph and in total `seconds`: always an estimate."""

    kind: str = "estimate, not a measurement"
    gpu: Gpu
    work: Work
    counts_from: str
    parts: tuple[PartEstimate, ...]
    seconds: float
    handoff: HandoffEstimate | None
    published: tuple[Comparison, ...]
