"""What an estimate of a GPU holds: the work, the floor of every part of it, the handoff, and what others published."""

__all__ = ["Comparison", "Estimate", "HandoffEstimate", "PartEstimate", "Work"]

import msgspec

from sdxl_trt.benchmarks.roofline.flops import Counts
from sdxl_trt.benchmarks.roofline.gpus import Gpu
from sdxl_trt.benchmarks.roofline.published import Published, Rate


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be made: pictures of `height` × `width` pixels, `batch` at once, in steps of the base and refiner.

    `rows` are a UNet's rows a picture: 2 with guidance, 1 without. `tokens` are the prompts', in chunks of 77.
    """

    base_steps: int
    refiner_steps: int
    height: int = 1024
    width: int = 1024
    batch: int = 1
    rows: int = 2
    tokens: int = 77


class PartEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """A graph's share of a picture: what a call costs, and the seconds a call takes at least.

    `compute` is its multiply-adds at the peak rate, `memory` its least bytes at the peak bandwidth, `floor` the longer
    of the two. `traffic` is no floor: the seconds where weights and the operands of every product go through memory.
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
    """What the refiner saves or costs against the base alone, in seconds and bytes; None where there is no refiner.

    `saved` is over all refiner steps. `load` is the refiner's UNet over PCI Express from host memory at its peak rate,
    and `swap` that and the base's way back for the next batch; `steps_to_pay` is how many refiner steps save a swap.
    `resident` are the bytes of all weights together, and `fits` whether the GPU has them.
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
    """A published time beside the floor of the same work on the same GPU."""

    published: Published
    floor: float

    @property
    def share(self) -> float:
        """The part of the published time that the floor explains."""
        return self.floor / self.published.seconds


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """The floor of one batch of pictures on a GPU, by graph, with `seconds` in all; an estimate by its nature."""

    kind: str = "estimate, not a measurement"
    gpu: Gpu
    work: Work
    counts_from: str
    parts: tuple[PartEstimate, ...]
    seconds: float
    handoff: HandoffEstimate | None
    published: tuple[Comparison, ...]
