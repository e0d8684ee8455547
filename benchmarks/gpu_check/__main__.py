"""Check on an NVIDIA GPU what cannot be tested without one: ``make gpu-check`` prints a report to paste in an issue.

The checks run one by one and continue after a failure. Exit code 0 if none failed, 1 if one did, 3 without a GPU.
"""

__all__ = ["Result", "main", "report", "run_check", "run_checks"]

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from sdxl_trt.benchmarks.gpu_check.checks import Check, all_checks
from sdxl_trt.benchmarks.gpu_check.workplace import Skipped, Workplace
from sdxl_trt.benchmarks.measure import gpu_extras, gpu_facts, no_driver
from sdxl_trt.engines.backends.trt import device_available

NO_GPU = 3
COMMAND = "python -m sdxl_trt.benchmarks.gpu_check"
Outcome = Literal["ok", "FAILED", "skipped"]


class Result(msgspec.Struct, frozen=True):
    """The result of a check: `seen` is what it found, or why it failed or was skipped, on one line."""

    name: str
    outcome: Outcome
    seconds: float
    seen: str


def main(argv: list[str] | None = None) -> int:
    """Run the checks, print the report to stdout and progress to stderr, and return the exit code."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    bundle_help = "check this bundle; missing plans are built into it (default: a copy of the embedded pair)"
    parser.add_argument("--bundle", type=Path, metavar="DIR", help=bundle_help)
    parser.add_argument("--look", action="store_true", help="only print the extras that the driver runs; check nothing")
    parser.add_argument("--debug", action="store_true", help="print the traceback of every failure to stderr")
    arguments = parser.parse_args(argv)
    reason = no_driver()
    if arguments.look and reason is None:
        sys.stdout.write(f"{gpu_extras()}\n")
        return 0
    reason = reason or device_available()
    facts = gpu_facts()
    if reason:
        sys.stdout.write(report(facts, [], no_gpu=reason))
        return NO_GPU
    with tempfile.TemporaryDirectory(prefix="sdxl-trt-gpu-") as folder:
        workplace = Workplace(Path(folder), arguments.bundle)
        results = run_checks(all_checks(), workplace, _print_result, debug=arguments.debug)
        timings = workplace.timings()
    sys.stdout.write(report(facts, results, timings))
    return 1 if any(result.outcome == "FAILED" for result in results) else 0


def run_checks(
    checks: Sequence[Check], workplace: Workplace, tell: Callable[[Result], None], *, debug: bool = False
) -> list[Result]:
    """Run `checks` in order and call `tell` with each result; a failure does not stop the others."""
    results = []
    for check in checks:
        results.append(run_check(check, workplace, debug=debug))
        tell(results[-1])
    return results


def run_check(check: Check, workplace: Workplace, *, debug: bool = False) -> Result:
    """Run one check and return its result; an exception becomes a failure."""
    started = time.perf_counter()
    outcome: Outcome = "ok"
    try:
        seen = check.run(workplace)
    except Skipped as exc:
        outcome, seen = "skipped", str(exc)
    except Exception as exc:  # noqa: BLE001 - any error is reported
        outcome, seen = "FAILED", f"{type(exc).__name__}: {exc}"
        if debug:
            traceback.print_exc()
    return Result(check.name, outcome, time.perf_counter() - started, workplace.without_paths(_one_line(seen)))


def report(
    facts: dict[str, str], results: Sequence[Result], timings: Sequence[str] = (), *, no_gpu: str | None = None
) -> str:
    """Return the whole report as Markdown."""
    lines = ["# GPU check of sdxl-trt", "", *(f"- {name}: {_one_line(value)}" for name, value in facts.items()), ""]
    if no_gpu is not None:
        return "\n".join([*lines, f"**no GPU**: {_one_line(no_gpu)}. Nothing was checked.", ""])
    lines += ["| check | outcome | seconds | seen |", "|---|---|---|---|"]
    lines += [
        f"| {result.name} | {_emphasized(result.outcome)} | {result.seconds:.1f} | {_cell(result.seen)} |"
        for result in results
    ]
    counts = [
        f"{sum(result.outcome == outcome for result in results)} {outcome}" for outcome in ("ok", "FAILED", "skipped")
    ]
    lines += ["", ", ".join(counts) + ".", ""]
    if timings:
        lines += ["Timings of the checks' runs, one each, without warm-up: proof that it runs, no benchmark.", "",
                  *timings, ""]  # fmt: skip
    return "\n".join(lines)


def _print_result(result: Result) -> None:
    sys.stderr.write(f"{result.outcome:8} {result.seconds:7.1f} s  {result.name}: {result.seen}\n")


def _emphasized(outcome: Outcome) -> str:
    return f"**{outcome}**" if outcome == "FAILED" else outcome


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
