"""Measure reading and checking a plan of SDXL's size, and simulate a cold run: ``make bench-load``.

Every measurement is a process of its own; the ways take turns, so that changes of the machine's speed affect all. The
file is in the page cache. The timeline is simulated with given rates: nothing in it was measured on a GPU. Writes JSON
and a Markdown table beside it.
"""

__all__ = ["Report", "Row", "bars", "main", "table"]

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sdxl_trt.benchmarks.cold_load.reading import Lap, Way, make_file, measure_way
from sdxl_trt.benchmarks.cold_load.timeline import RATES_4090, Policy, Rates, Timeline, draw, simulate
from sdxl_trt.benchmarks.measure import (
    RESULTS_FOLDER,
    Bar,
    bars_table,
    load_average,
    machine,
    machine_words,
    missed,
    results_parser,
    write_results,
)

COMMAND = "python -m sdxl_trt.benchmarks.cold_load"
RESULTS = RESULTS_FOLDER / "cold_load.json"
BARS = {2: 1.8, 4: 3.0}
"""How many times as fast as sha256 alone in one thread, over bytes in memory, by threads."""
EXTRA = 64 << 20
PLAN = 5_130_000_000
"""The bytes of the weights of SDXL's base UNet in fp16."""
_CHECKED: tuple[Way, ...] = ("whole", "touched", "stream")
WORDS: dict[str, str] = {
    "sha256": "sha256 alone, bytes in memory",
    "file": "sha256 of the file",
    "before": "read and checked in turn (before)",
    "whole": "read and checked into new memory",
    "touched": "the same into memory used before",
    "stream": "read and checked chunk by chunk, dropped after use",
}


class Row(msgspec.Struct, frozen=True):
    """One way: the median rate, and the medians of the rounds' ratios.

    `to_file` is the rate divided by that of the file's sha256 in one thread, `to_memory` by that of sha256 alone over
    bytes in memory, `to_before` by that of reading as it was before. `processor` is seconds of processor time per GB,
    which other programs on the machine influence less.
    """

    way: str
    threads: int
    gigabytes_per_second: float
    processor: float
    to_file: float
    to_memory: float
    to_before: float
    memory: int
    laps: list[Lap]


class Report(msgspec.Struct, frozen=True):
    """Everything that one run measured or simulated; `load` is the system's load average at its beginning and end."""

    machine: dict[str, str | int]
    bytes: int
    rounds: int
    load: tuple[float, float]
    rows: list[Row]
    rates: Rates
    speed: float
    timelines: list[Timeline]
    bars: list[Bar]


def measure(path: Path, size: int, rounds: int, only: Sequence[str] = ()) -> list[Row]:
    """Measure the ways `only`, or all, in turns, beside those that they are compared with; the file must be cached."""
    cores = int(machine()["cores"])
    threads = sorted({1, 2, min(4, cores)})
    ways: list[tuple[Way, int]] = [("sha256", 1), ("file", 1), ("before", 1)]
    ways += [(way, count) for way in _CHECKED if way in (only or WORDS) for count in threads if count <= cores]
    laps: dict[tuple[Way, int], list[Lap]] = {way: [] for way in ways}
    for turn in range(rounds):
        for way, count in ways:
            sys.stderr.write(f"round {turn + 1} of {rounds}: {WORDS[way]}, {count} threads\n")
            laps[way, count].append(measure_way(way, path, count))
    others = (laps["file", 1], laps["sha256", 1], laps["before", 1])
    return [_row(each, size, others) for each in laps.values()]


def _row(laps: list[Lap], size: int, others: Sequence[Sequence[Lap]]) -> Row:
    ratios = [
        statistics.median(other.seconds / lap.seconds for other, lap in zip(each, laps, strict=True)) for each in others
    ]

    rate = size / statistics.median(lap.seconds for lap in laps) / 1e9
    processor = statistics.median(lap.processor_seconds for lap in laps) / size * 1e9
    memory = max(lap.memory for lap in laps)
    to_file, to_memory, to_before = ratios
    return Row(laps[0].way, laps[0].threads, rate, processor, to_file, to_memory, to_before, memory, laps)


def bars(rows: Sequence[Row], size: int) -> list[Bar]:
    """Return the bars of speed, for 2 and 4 threads, and of memory; without the cores they are not measured."""
    found = []
    for way in _CHECKED:
        for threads, least in BARS.items():
            ratio = next((row.to_memory for row in rows if (row.way, row.threads) == (way, threads)), None)
            value = "not measured" if ratio is None else f"{ratio:.2f}"
            met = None if ratio is None else ratio >= least
            found.append(Bar(f"{WORDS[way]}, {threads} threads, times sha256 alone", f">= {least}", value, met))
    whole = max((row.memory for row in rows if row.way in ("whole", "touched")), default=None)
    extra = "not measured" if whole is None else f"{(whole - size) / (1 << 20):+.0f} MiB"
    return [*found, Bar("memory beside the plan", "<= 64 MiB", extra, None if whole is None else whole <= size + EXTRA)]


def simulate_all(rates: Rates, speed: float) -> list[Timeline]:
    """Return the timelines before and after, under swap and resident, and after with memory for the largest plan."""
    policies: tuple[Policy, ...] = ("swap", "resident")
    largest = max(rates.plans.values())
    ways = (
        ("one thread, one phase ahead", False, None),
        ("several threads, in order of use", True, None),
        ("the same with host memory for one UNet", True, largest),
    )
    return [
        simulate(f"{policy}, {word}", policy, rates, ahead=ahead, speed=speed, limit=limit)
        for policy in policies
        for word, ahead, limit in ways
    ]


def table(report: Report) -> str:
    """Return the report as Markdown."""
    load = f"{report.load[0]:.1f} at the beginning, {report.load[1]:.1f} at the end"
    lines = [
        "# Loading from cold",
        "",
        f"`{COMMAND}`; {machine_words(report.machine)}.",
        "",
        f"## Reading and checking {report.bytes / 1e9:.2f} GB from the page cache",
        "",
        f"Medians of {report.rounds} rounds, every measurement in a new process. Load average {load}.",
        "",
        *bars_table(report.bars),
        "",
        "| | threads | GB/s | processor s/GB | times the file's sha256 | times sha256 alone | times before | memory |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *map(_row_line, report.rows),
        "",
        "## A run from cold, simulated",
        "",
        *_timeline_lines(report),
    ]
    return "\n".join(lines) + "\n"


def _row_line(row: Row) -> str:
    rates = f"{row.gigabytes_per_second:.2f} | {row.processor:.2f}"
    ratios = f"{row.to_file:.2f} | {row.to_memory:.2f} | {row.to_before:.2f}"
    return f"| {WORDS[row.way]} | {row.threads} | {rates} | {ratios} | {row.memory / 1e6:.0f} MB |"


def _timeline_lines(report: Report) -> list[str]:
    rates, speed = report.rates, report.speed
    seconds = max(timeline.end for timeline in report.timelines)
    about = (
        f"The real pool with engines that sleep, {speed:g} times as fast. Rates are {rates.name}, not measured: disk"
        f" {rates.disk:g} GB/s, sha256 {rates.hash:g} GB/s in each of {rates.threads} threads (page faults are not"
        f" simulated), copies to the device {rates.pcie:g} GB/s, {rates.base_steps} base steps of"
        f" {rates.base_step:g} ms, {rates.refiner_steps} refiner steps of {rates.refiner_step:g} ms."
    )
    letters = "1 and 2 are the text encoders, B is the base, R the refiner, D the decoder"
    lines = [
        about,
        "",
        "| | first base step | stall at the handoff | end |",
        "|---|---:|---:|---:|",
        *(f"| {each.name} | {each.first_step:.2f} s | {each.stall:.2f} s | {each.end:.2f} s |"
          for each in report.timelines),
        "",
        f"Each column of a timeline is {seconds / 100:.3f} s: {letters}.",
    ]  # fmt: skip
    for each in report.timelines:
        lines += ["", "```text", each.name, *draw(each, seconds), "```"]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurements and the simulation; return 1 if a bar was missed."""
    prog = "sdxl_trt.benchmarks.cold_load"
    parser = results_parser(prog, __doc__, work=Path("out/bench-load"), results=RESULTS, case="way")
    parser.add_argument("--bytes", type=int, default=PLAN, metavar="N", help=f"size of the file (default: {PLAN})")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds (default: 5)")
    parser.add_argument("--speed", type=float, default=5.0, metavar="X", help="of the simulated timeline (default: 5)")
    arguments = parser.parse_args(argv)
    size, rounds = (64 << 20, 2) if arguments.quick else (arguments.bytes, arguments.rounds)
    path = arguments.work / "plan.bin"
    make_file(path, size)
    _cache(path)
    load = load_average()
    rows = measure(path, size, rounds, arguments.only)
    timelines = simulate_all(RATES_4090, arguments.speed)
    loads = (load, load_average())
    found = bars(rows, size)
    report = Report(machine(), size, rounds, loads, rows, RATES_4090, arguments.speed, timelines, found)
    write_results(report, table(report), arguments.results)
    sys.stdout.write(table(report))
    return 1 if missed(report.bars) else 0


def _cache(path: Path) -> None:
    """Read the file once, so that it is in the page cache."""
    with path.open("rb", buffering=0) as file:
        while file.read(64 << 20):
            pass


if __name__ == "__main__":
    sys.exit(main())
