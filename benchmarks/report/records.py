"""What trt-bench writes: the records of a run, their statistics, and the JSON file that keeps them."""

__all__ = [
    "SCHEMA",
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

from sdxl_trt.benchmarks.measure import Bar, write_json
from sdxl_trt.engines import CorruptError

SCHEMA = 1
"""Counted up when a field changes its meaning or goes; a field that is new leaves it."""


class BenchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What every contestant was asked for. Sizes are pixels, `tokens` those of the prompts."""

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
    """One way to run the model: what it is, what making it ready cost, and what it took, or why it could not run.

    Seconds of importing, loading and compiling stand apart from every run. `peak_rss` and `peak_gpu` are bytes.
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
    """Why it did not run a task, by task, where others did."""


class Timed(msgspec.Struct, frozen=True, kw_only=True):
    """The seconds of every timed run, in the order in which they were taken, and their statistics."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median in seconds."""
        return statistics.median(self.seconds)

    @property
    def p95(self) -> float:
        """Return the 95th percentile in seconds, the largest value of fewer than twenty."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, -(-95 * len(ordered) // 100) - 1)]

    @property
    def spread(self) -> float:
        """Return half the distance of the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median if self.median else 0.0


class Measurement(Timed, frozen=True, kw_only=True):
    """Every timed run of one task by one contestant.

    `what` is a task of the benchmark ("picture", "base UNet step", "refiner UNet step", "text encoders", "handoff",
    "VAE decode", "host per step", ...) and `rows` the first axis of a UNet's call. `joules` is None without NVML.
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
    """Seconds of each stage of the median run, of an end-to-end task."""
    handoff: float | None = None
    """Of a picture: the fraction that the base denoised, None for the base alone."""
    sweep: str = ""
    """"size", "batch" or "handoff" for one of a series that varies it; "" for what contestants are compared in."""
    difference: float | None = None
    """Largest difference of what came out from PyTorch's (without it: ours), as a share of its largest value."""


class ColdStart(Timed, frozen=True, kw_only=True):
    """A process from its command to its first picture: seconds, and the peak of its resident memory in bytes."""

    name: str
    command: tuple[str, ...]
    peak_rss: int
    missing: str = ""


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of one variant against PyTorch fp32 at the same noise.

    `stage` is "embeddings", "handoff latents", "final latents" or "pixels". `psnr` is in dB, infinite (None) for equal
    arrays; `ssim` is that of pixels alone. `score` is the prompt score of the embedded pair. `limit` is the PSNR asked.
    Of several `pictures` PSNR and SSIM are the lowest, and the score is the share that is right. A variant that could
    not be measured has one row without a stage, which says in `missing` why.
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
    """A task by one contestant over the same task by another, taken round by round.

    Both ran in every round, one right after the other, so that what the machine did meanwhile met both. `median` is
    that of the rounds' ratios, `low` and `high` the span of the middle eight of ten: the spread that the median of
    another run is to lie in.
    """

    what: str
    contestant: str
    against: str
    rounds: int
    median: float
    low: float
    high: float


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one run of trt-bench measured, and what a reader needs to run it again."""

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
    """The floor of a task in seconds: its FLOPs at the peak GEMM rate that was measured."""
    ratios: tuple[Ratio, ...] = ()

    def of(self, contestant: str, what: str) -> Measurement | None:
        """Return the measurement of a task by a contestant that others are compared with, or None."""
        found = (one for one in self.measurements if (one.contestant, one.what, one.sweep) == (contestant, what, ""))
        return next(found, None)


def write_report(report: BenchReport, path: Path) -> None:
    """Write `report` to `path` as JSON; it appears when it is whole."""
    write_json(report, path)


def read_report(path: Path) -> BenchReport:
    """Return the report in `path`. Raises CorruptError for a file that is none, or is of another schema."""
    try:
        report = msgspec.json.decode(path.read_bytes(), type=BenchReport)
    except (OSError, msgspec.MsgspecError) as exc:
        raise CorruptError(f"{path}: no report of trt-bench ({exc}); write one with: trt-bench --out DIR") from exc
    if report.schema != SCHEMA:
        raise CorruptError(
            f"{path}: a report of schema {report.schema}, and this trt-bench reads {SCHEMA}; run it again"
        )
    return report
