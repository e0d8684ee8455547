"""The records of a trt-bench run, their statistics, and the JSON file that stores them."""

__all__ = [
    "Bar",
    "BenchReport",
    "BenchSettings",
    "ColdStart",
    "Contestant",
    "Measurement",
    "Quality",
    "Ratio",
    "Timed",
    "read_report",
    "write_report",
]

import statistics
from pathlib import Path

import msgspec

from sdxl_trt.benchmarks.measure import Bar, GpuReport, write_json
from sdxl_trt.engines import CorruptError

SCHEMA = 1
"""Incremented when a field is removed or changes its meaning, not when one is added."""


class BenchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of every contestant. Sizes are in pixels, `tokens` is the length of the prompts."""

    bundle: str
    model: str
    width: int
    height: int
    batch: int
    steps: int
    handoff: float | None
    guidance: float
    seed: int
    tokens: int
    runs: int
    warmups: int
    threads: int
    prompt: str


class Contestant(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run the model: its title and versions, its preparation and memory, or why it could not run.

    Seconds of importing, loading and compiling are not part of any run. `peak_rss` and `peak_gpu` are in bytes.
    """

    name: str
    title: str
    precision: str
    device: str = "cpu"
    missing: str = ""
    versions: dict[str, str] = {}
    command: tuple[str, ...] = ()
    import_seconds: float | None = None
    load_seconds: float | None = None
    compile_seconds: float | None = None
    peak_rss: int | None = None
    peak_gpu: int | None = None
    not_run: dict[str, str] = {}
    """Reasons by task, for tasks that it did not run."""
    note: str = ""
    """What a reader must know of it, such as the parts that are not in its precision."""


class Timed(msgspec.Struct, frozen=True, kw_only=True):
    """The seconds of every timed run, in order, and their statistics."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median in seconds."""
        return statistics.median(self.seconds)

    @property
    def p95(self) -> float:
        """Return the 95th percentile in seconds; of fewer than twenty runs the largest."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, -(-95 * len(ordered) // 100) - 1)]

    @property
    def spread(self) -> float:
        """Return half the interquartile range, as a fraction of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median if self.median else 0.0


class Measurement(Timed, frozen=True, kw_only=True):
    """Every timed run of one task by one contestant.

    `what` is a task of the benchmark ("picture", "base UNet step", "refiner UNet step", "text encoders", "handoff",
    "VAE decode", "host per step", ...) and `rows` the first axis of a UNet call. `joules` is None without NVML.
    """

    contestant: str
    what: str
    width: int
    height: int
    batch: int
    rows: int | None = None
    pictures: int | None = None
    joules: float | None = None
    stages: dict[str, float] = {}
    """For an end-to-end task: seconds of each stage of the median run."""
    handoff: float | None = None
    """For a picture: the fraction that the base denoised, or None for the base alone."""
    sweep: str = ""
    """"size", "batch" or "handoff" for a point of a sweep; "" for the comparison of contestants."""
    difference: float | None = None
    """Largest difference of the output from PyTorch's (without it: ours), as a fraction of its largest value."""


class ColdStart(Timed, frozen=True, kw_only=True):
    """A process from command to first picture: seconds, and its peak resident memory in bytes."""

    name: str
    command: tuple[str, ...]
    peak_rss: int
    missing: str = ""


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of one variant against PyTorch fp32 at the same noise.

    `stage` is "embeddings", "handoff latents", "final latents" or "pixels". `psnr` is in dB, None for equal arrays;
    `ssim` is given for pixels only. `score` is the prompt score of the embedded pair. `limit` is the required PSNR.
    PSNR and SSIM are the lowest over all `pictures`; the score is the share of pictures that match their prompt. A
    variant that could not be measured has one row without a stage, with the reason in `missing`.
    """

    variant: str
    stage: str
    psnr: float | None
    ssim: float | None = None
    score: float | None = None
    limit: float | None = None
    passed: bool = True
    pictures: int = 1
    missing: str = ""


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """One contestant's time for a task divided by another's, round by round.

    Both ran in every round, one right after the other, so that disturbances of the machine affect both. `median` is
    over the rounds' ratios; `low` and `high` span the middle eight of ten: a rerun's median should lie between them.
    """

    what: str
    contestant: str
    against: str
    rounds: int
    median: float
    low: float
    high: float


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one run of trt-bench measured, and what is needed to repeat it."""

    schema: int = SCHEMA
    command: tuple[str, ...] = ()
    machine: dict[str, str | int]
    versions: dict[str, str]
    settings: BenchSettings
    contestants: tuple[Contestant, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    cold_starts: tuple[ColdStart, ...] = ()
    quality: tuple[Quality, ...] = ()
    bars: tuple[Bar, ...] = ()
    notes: tuple[str, ...] = ()
    floors: dict[str, float] = {}
    """The floor of a task in seconds: its FLOPs at the measured peak GEMM rate."""
    ratios: tuple[Ratio, ...] = ()
    gpu: GpuReport | None = None
    """What gpu-check found on another machine, shown beside this run; None without a file of it."""

    def of(self, contestant: str, what: str) -> Measurement | None:
        """Return the measurement of a task by a contestant, not of a sweep, or None."""
        found = (one for one in self.measurements if (one.contestant, one.what, one.sweep) == (contestant, what, ""))
        return next(found, None)


def write_report(report: BenchReport, path: Path) -> None:
    """Write `report` to `path` as JSON, atomically."""
    write_json(report, path)


def read_report(path: Path) -> BenchReport:
    """Return the report in `path`. Raises CorruptError if it is not a report, or has another schema."""
    try:
        report = msgspec.json.decode(path.read_bytes(), type=BenchReport)
    except (OSError, msgspec.MsgspecError) as exc:
        raise CorruptError(f"{path}: not a trt-bench report ({exc}); write one with: trt-bench --out DIR") from exc
    if report.schema != SCHEMA:
        raise CorruptError(
            f"{path}: report schema {report.schema}, but this trt-bench reads schema {SCHEMA}; run it again"
        )
    return report
