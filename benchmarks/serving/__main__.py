"""Measure trt-serve under load, and beside a server of diffusers: ``make bench-serve``.

Servers and probes are processes of their own, on loopback, with the embedded pair; the load comes from this process,
which shares the cores with them. Writes JSON and a Markdown table beside it.
"""

__all__ = ["Report", "bars", "main", "table"]

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sdxl_trt.benchmarks.measure import (
    RESULTS_FOLDER,
    Bar,
    at_most,
    bars_table,
    load_average,
    machine,
    machine_words,
    missed,
    package_versions,
    results_parser,
    write_results,
)
from sdxl_trt.benchmarks.serving.cases import WARM, Burst, OpenLoop, Turns, bursts, capacity, open_loops, turns
from sdxl_trt.benchmarks.serving.servers import diffusers_server, running, trt_serve
from sdxl_trt.engines import SdxlTrtError

COMMAND = "python -m sdxl_trt.benchmarks.serving"
RESULTS = RESULTS_FOLDER / "serving.json"
CASES = ("burst", "open", "turns")
PACKAGES = ("sdxl-trt", "onnxruntime", "fastapi", "uvicorn", "diffusers", "torch")
QUEUE, COUNT, ROUNDS = 32, 1000, 3
SIZE, STEPS = "128x128", 8
SLOW_SIZE, SLOW_STEPS = "256x256", 20
"""Of the burst: a picture takes longer than all requests need to arrive."""
CLIENTS = 4
TURNS = 4
LIVE, LIKE, RATIO = 0.05, 50.0, 0.5
_BYTES_A_MINUTE = 2 << 20


class Report(msgspec.Struct, frozen=True):
    """Everything that one run measured; `batch` are the most pictures that share a call."""

    machine: dict[str, str | int]
    versions: dict[str, str]
    load: tuple[float, float]
    batch: int
    capacity: float
    bursts: list[Burst]
    open: list[OpenLoop]
    turns: Turns | None
    bars: list[Bar]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the results, and return the exit code: 1 if a bar is missed."""
    parser = results_parser(
        "sdxl_trt.benchmarks.serving", __doc__, work=Path("out/bench-serve"), results=RESULTS, case="case"
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="length of each open loop (default: 300)")
    given = parser.parse_args(argv)
    seconds = 5.0 if given.quick else given.seconds
    chosen = given.only or CASES
    before = load_average()
    found, full, loops, contest = list[Burst](), math.nan, list[OpenLoop](), None
    try:
        if "burst" in chosen:
            with running(trt_serve("--queue", str(QUEUE)), "/health/ready") as server:
                found = bursts(server, SLOW_SIZE, SLOW_STEPS, COUNT, 1 if given.quick else ROUNDS)
        if "open" in chosen:
            with running(trt_serve("--queue", "1000", "--queue-pictures", "1000"), "/health/ready") as server:
                full = capacity(server, SIZE, STEPS, min(seconds, 30.0))
                loops = open_loops(server, SIZE, STEPS, full, seconds)
        if "turns" in chosen:
            contest = _contest(given.work, rounds=2 if given.quick else TURNS, seconds=min(seconds, 30.0))
    except SdxlTrtError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return exc.exit_code
    report = Report(machine(), package_versions(PACKAGES), (before, load_average()), _batch(), full, found, loops,
                    contest, bars(found, loops, contest, _batch()))  # fmt: skip
    write_results(report, table(report), given.results)
    sys.stdout.write(table(report))
    return int(missed(report.bars))


def _batch() -> int:
    """Return how many pictures of the embedded pair share a call."""
    from sdxl_trt.runtime import open_bundle  # noqa: PLC0415 - no engine is loaded

    with open_bundle() as pipeline:
        return pipeline.pictures_at_once


def _contest(work: Path, *, rounds: int, seconds: float) -> Turns:
    from sdxl_trt.mini import materialize  # noqa: PLC0415 - needs safetensors

    base, refiner = materialize(work / "mini")
    with (
        running(trt_serve(), "/health/ready") as ours,
        running(diffusers_server(str(base), str(refiner)), "/openapi.json") as theirs,
    ):
        return turns(ours, theirs, SIZE, STEPS, rounds=rounds, seconds=seconds, clients=CLIENTS)


def bars(found: Sequence[Burst], loops: Sequence[OpenLoop], contest: Turns | None, batch: int) -> list[Bar]:
    """Return the bars of everything that was measured."""
    live = [*(each.live for each in found), *(each.live for each in loops)]
    growth = [each.growth for each in loops]
    throughput, tail = (None, None) if contest is None else _ratios(contest)
    return [
        *_of_bursts(found, batch),
        at_most("GET /health/live meanwhile, p99", max(live, default=None), LIVE, f"{LIVE * 1000:.0f} ms",
                lambda seconds: f"{seconds * 1000:.1f} ms"),
        at_most(f"growth of the resident memory in an open loop, from {WARM:.0%} of it on", max(growth, default=None),
                _BYTES_A_MINUTE, f"{_BYTES_A_MINUTE / 2**20:.0f} MiB a minute",
                lambda size: f"{size / 2**20:+.2f} MiB a minute"),
        at_most("time a picture, times that of diffusers", throughput, RATIO, f"{RATIO}", "{:.2f}".format),
        at_most("p95 of the latency, times that of diffusers", tail, 1.0, "1", "{:.2f}".format),
    ]  # fmt: skip


def _of_bursts(found: Sequence[Burst], batch: int) -> list[Bar]:
    words = {
        "accepted": f"the queue's {QUEUE}, {batch} in work, and those drawn meanwhile",
        "answered": "200, or 429 with Retry-After from 1 to 120",
    }
    if not found:
        return [Bar(f"{COUNT} requests at once: {what}", bar, "not measured", None) for what, bar in words.items()]
    fits = all(QUEUE <= each.accepted <= QUEUE + batch + each.before_last for each in found)
    proper = not any(each.other or each.wrong_retry for each in found)
    own = not any(each.strange for each in found) and all(each.likeness >= LIKE for each in found)
    accepted = ", ".join(f"{each.accepted} ({each.before_last} drawn meanwhile)" for each in found)
    lowest = min(each.likeness for each in found)
    return [
        Bar(f"{COUNT} requests at once: accepted", words["accepted"], accepted, fits),
        Bar(f"{COUNT} requests at once: answered", words["answered"],
            f"{sum(each.other for each in found)} lost, {sum(each.wrong_retry for each in found)} wrong", proper),
        Bar("their pictures, beside those drawn alone", f"none another's, >= {LIKE:.0f} dB",
            f"{sum(each.strange for each in found)} another's, {lowest:.1f} dB", own),
    ]  # fmt: skip


def _ratios(contest: Turns) -> tuple[float, float]:
    """Return our time a picture and our 95th percentile, each divided by diffusers' in the same turn; medians."""
    pairs = list(zip(contest.ours, contest.theirs, strict=True))
    times = [theirs[0] / ours[0] for ours, theirs in pairs]
    return statistics.median(times), statistics.median(ours[1] / theirs[1] for ours, theirs in pairs)


def table(report: Report) -> str:
    """Return the report as Markdown."""
    load = f"{report.load[0]:.1f} at the beginning, {report.load[1]:.1f} at the end"
    about = (
        f"`{COMMAND}`, the embedded pair; {machine_words(report.machine)}. Load average {load}. The clients share the"
        " cores with the server."
    )
    lines = [
        "# trt-serve under load",
        "",
        about,
        "",
        *bars_table(report.bars),
    ]
    if report.open:
        arrivals = (
            f"Random arrivals at a share of {report.capacity:.1f} pictures a second ({SIZE}, {STEPS} steps), which"
            " clients get that ask again and again:"
        )
        lines += [
            "",
            arrivals,
            "",
            "| load | seconds | drawn | refused | lost | p50 | p95 | p99 | in UNets | /health/live p99 | memory |",
            "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
            *(_line(loop) for loop in report.open),
        ]
    if report.turns is not None:
        lines += _turns(report.turns)
    return "\n".join(lines) + "\n"


def _line(loop: OpenLoop) -> str:
    seconds = " | ".join(f"{value:.2f} s" for value in (loop.p50, loop.p95, loop.p99))
    return (
        f"| {loop.load:.0%} | {loop.seconds:.0f} | {loop.drawn} | {loop.refused} | {loop.lost} | {seconds} |"
        f" {loop.unets:.0%} | {loop.live * 1000:.1f} ms | {loop.growth / 2**20:+.2f} MiB/min |"
    )


def _turns(contest: Turns) -> list[str]:
    def told(laps: Sequence[tuple[float, float]]) -> str:
        return " | ".join([", ".join(f"{rate:.2f}" for rate, _ in laps), ", ".join(f"{p95:.2f}" for _, p95 in laps)])

    about = (
        f"In turns with diffusers behind FastAPI (benchmarks/serving/diffusers_server.py), {contest.clients} clients,"
        f" {SIZE}, {STEPS} steps, handoff 0.75, fp32; the same seed's pictures: {contest.likeness:.1f} dB."
    )
    return [
        "",
        about,
        "",
        "| server | pictures a second, by turn | p95 of the latency in seconds, by turn |",
        "|---|---|---|",
        f"| trt-serve | {told(contest.ours)} |",
        f"| diffusers | {told(contest.theirs)} |",
    ]


if __name__ == "__main__":
    raise SystemExit(main())
