"""Measure the host's time around the UNet per step, ours and diffusers' in the same run: ``make bench-host``.

Guidance, sampler and bookkeeping for one picture of 1024², with an engine that returns at once. Our runs and diffusers'
take turns, so that changes of the machine's speed affect both; diffusers runs with one torch thread and with torch's
default, numpy with one. A large block is freed first, as after loading a model: from then on the allocator does not
return the latents' memory to the system in every step. Writes JSON and a Markdown table beside it.
"""

__all__ = ["Report", "Row", "Spread", "bars", "main", "table"]

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np

from sdxl_trt.benchmarks.host_time.cases import CASES, ELSEWHERE, SIDE, HostCase, Lap, Precision, our_run, their_run
from sdxl_trt.benchmarks.measure import RESULTS_FOLDER, VERDICTS, Bar, machine, missed
from sdxl_trt.engines.host import atomic_write

COMMAND = "python -m sdxl_trt.benchmarks.host_time"
RESULTS = RESULTS_FOLDER / "host_time.json"
BAR = 0.5
STEPS, ROUNDS, WARM_UP = 20, 40, 3
HEAP = 16 << 20
PRECISIONS: tuple[Precision, ...] = ("float32", "float16")


class Spread(msgspec.Struct, frozen=True):
    """Microseconds per step over all rounds: the median, and the 10th and 90th percentiles."""

    median: float
    low: float
    high: float


class Row(msgspec.Struct, frozen=True):
    """One sampler at one precision of the UNet's inputs and outputs; `ours` etc. do not include drawing noise."""

    sampler: str
    scheduler: str
    precision: str
    diffusers: str
    ours: Spread
    one_thread: Spread
    default_threads: Spread
    our_noise: Spread
    their_noise: Spread

    @property
    def ratio(self) -> float:
        """Return our time divided by diffusers' with one thread."""
        return self.ours.median / self.one_thread.median


class Report(msgspec.Struct, frozen=True):
    """Everything that one run measured; `missing` is the reason by sampler for those not measured."""

    machine: dict[str, str | int]
    versions: dict[str, str]
    threads: int
    steps: int
    rounds: int
    rows: list[Row]
    missing: dict[str, str]
    bars: list[Bar]


def measure(case: HostCase, precision: Precision, steps: int, rounds: int) -> Row:
    """Measure our run and both of diffusers' in turns for `rounds` rounds."""
    import torch  # noqa: PLC0415 - takes seconds

    _settle_heap()
    ours, theirs = our_run(case.sampler, precision, steps), their_run(case, precision, steps)
    default = torch.get_num_threads()
    laps: tuple[list[Lap], ...] = ([], [], [])
    for turn in range(WARM_UP + rounds):
        for each, threads, run in zip(laps, (1, 1, default), (ours, theirs, theirs), strict=True):
            torch.set_num_threads(threads)
            found = run()
            if turn >= WARM_UP:
                each.extend(found)
    host = [_spread([lap.host for lap in each]) for each in laps]
    noise = [_spread([lap.noise for lap in each]) for each in laps[:2]]
    return Row(case.sampler, case.scheduler, precision, version("diffusers"), *host, *noise)


def _settle_heap() -> None:
    """Free a large block: glibc's allocator then keeps up to twice its size of freed memory."""
    np.ones(HEAP, np.uint8)


def _spread(seconds: list[float]) -> Spread:
    low, median, high = np.quantile(np.array(seconds) * 1e6, (0.1, 0.5, 0.9))
    return Spread(round(float(median), 1), round(float(low), 1), round(float(high), 1))


def bars(rows: Sequence[Row]) -> list[Bar]:
    """Return a bar for every row; only float32 has a limit: with a float16 UNet diffusers computes in fp16."""
    return [
        Bar(f"{row.sampler}, {row.precision}", f"<= {BAR}" if _barred(row) else "none", f"{row.ratio:.2f}", _met(row))
        for row in rows
    ]


def _barred(row: Row) -> bool:
    return row.precision == "float32"


def _met(row: Row) -> bool | None:
    return row.ratio <= BAR if _barred(row) else None


def table(report: Report) -> str:
    """Return the report as Markdown."""
    about = ", ".join(f"{name} {value}" for name, value in (report.machine | report.versions).items())
    lines = [
        f"Host time per step in microseconds, one picture of {SIDE}², guidance on (`{COMMAND}`): median over the steps",
        f"of {report.rounds} runs of {report.steps} steps that took turns, with the 10th and 90th percentiles. Time in",
        "the UNet is not included, nor is drawing noise, which has its own columns: both sides draw the same numbers",
        "sequentially. diffusers runs with one torch thread and with torch's default,",
        f"{report.threads}. The bar, {BAR}, is for one thread, like numpy's, and for float32: with a float16 UNet",
        f"diffusers computes in fp16, we in float32. {about}.",
        "",
        "| sampler | UNet | ours | diffusers, 1 thread | ratio | met | default | ratio | our noise | its | scheduler |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in report.rows]
    lines += [f"| {name} | | | | | - | | | | | {reason} |" for name, reason in report.missing.items()]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    verdict = VERDICTS[_met(row)]
    noise = [_cell(each) if each.median >= 1.0 else "" for each in (row.our_noise, row.their_noise)]
    cells = [
        row.sampler, row.precision, _cell(row.ours), _cell(row.one_thread), f"{row.ratio:.2f}", verdict,
        _cell(row.default_threads), f"{row.ours.median / row.default_threads.median:.2f}", *noise,
        f"{row.scheduler} {row.diffusers}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _cell(spread: Spread) -> str:
    return f"{spread.median:.0f} ({spread.low:.0f}–{spread.high:.0f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the results and return 1 if a bar was missed, else 0."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file to write; the table goes beside it")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps per run")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs of each side")
    parser.add_argument("--only", action="append", default=[], metavar="SAMPLER", help="measure only it; repeatable")
    parser.add_argument(
        "--peers", type=Path, metavar="PYTHON", help="Python of the peers' environment, for schedulers missing here"
    )
    arguments = parser.parse_args(argv)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    report = _run(arguments)
    for path, content in ((arguments.results, _json(report)), (arguments.results.with_suffix(".md"), table(report))):
        with atomic_write(path) as file:
            file.write(content.encode())
    sys.stdout.write(table(report))
    return 1 if missed(report.bars) else 0


def _json(report: Report) -> str:
    return msgspec.json.format(msgspec.json.encode(report), indent=1).decode() + "\n"


def _run(arguments: argparse.Namespace) -> Report:
    import torch  # noqa: PLC0415

    chosen = [case for case in CASES if not arguments.only or case.sampler in arguments.only]
    missing = {} if arguments.only else dict(ELSEWHERE)
    rows = []
    for case in chosen:
        if case.needs and find_spec(case.needs) is None:
            found = _ask_peers(case, arguments)
            rows += found
            if not found:
                missing[case.sampler] = f"{case.scheduler} needs {case.needs}: --peers"
            continue
        for precision in PRECISIONS:
            sys.stderr.write(f"{case.sampler}, {precision}\n")
            rows.append(measure(case, precision, arguments.steps, arguments.rounds))
    versions = {name: version(name) for name in ("sdxl-trt", "numpy", "torch")}
    return Report(
        machine(), versions, torch.get_num_threads(), arguments.steps, arguments.rounds, rows, missing, bars(rows)
    )


def _ask_peers(case: HostCase, arguments: argparse.Namespace) -> list[Row]:
    """Return the rows of `case` measured by this module in the peers' environment, or none without --peers."""
    if arguments.peers is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "rows.json"
        command = [
            str(arguments.peers), "-m", "sdxl_trt.benchmarks.host_time", "--only", case.sampler, "--results",
            str(results),
            "--steps", str(arguments.steps), "--rounds", str(arguments.rounds),
        ]  # fmt: skip
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)  # noqa: S603 - our own command
        return msgspec.json.decode(results.read_bytes(), type=Report).rows


if __name__ == "__main__":
    sys.exit(main())
