"""Check on an NVIDIA GPU what cannot be tested without one: ``make gpu-check`` prints a report to paste in an issue.

By default a pair of SDXL's size with random weights is checked, which gpu_check.pair makes. Every check runs in a
process of its own, the most important ones first, and a failure does not stop the others. Exit code 0 if none failed, 1
if one did, 3 without a GPU.
"""

__all__ = ["main"]

import argparse
import datetime as dt
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from sdxl_trt.benchmarks.gpu_check.checks import Check, Workplace, all_checks, make_workplace
from sdxl_trt.benchmarks.gpu_check.pair import EIGHT_BIT, OUT, PAIR, SECOND, make_command
from sdxl_trt.benchmarks.gpu_check.report import markdown, without_gpu
from sdxl_trt.benchmarks.gpu_check.runner import ProcessRunner, Runner, run_checks
from sdxl_trt.benchmarks.measure import CheckResult, GpuReport, gpu_extras, gpu_facts, no_driver, write_results
from sdxl_trt.engines import IncompatibleError, SdxlTrtError, UsageError
from sdxl_trt.engines.backends.trt import device_available
from sdxl_trt.engines.bundle import read_bundle

COMMAND = "python -m sdxl_trt.benchmarks.gpu_check"
MINUTES = 15.0
REPORT = "report.json"
_INTERRUPTED = 130


def main(
    argv: Sequence[str] | None = None, runner: Callable[[Path], Runner] | None = None, checks: Sequence[Check] = ()
) -> int:
    """Run the checks, print the report to stdout and progress to stderr, and return the exit code.

    `runner` returns what runs each check in a workplace (default: processes), `checks` are by default all.
    """
    arguments = _parser().parse_args(argv)
    reason = no_driver()
    if arguments.look and reason is None:
        sys.stdout.write(f"{gpu_extras()}\n")
        return 0
    reason = reason or device_available()
    if reason:
        sys.stdout.write(without_gpu(gpu_facts(), reason))
        return IncompatibleError.exit_code
    try:
        chosen = _chosen(checks or all_checks(compared=_has_plans(arguments.out / SECOND)), arguments.only)
        report, interrupted = _checked(arguments, chosen, runner)
        sys.stdout.write(markdown(report))  # first: the files may not be writable
        sys.stdout.flush()
        write_results(report, markdown(report), arguments.out / REPORT)
    except SdxlTrtError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return exc.exit_code
    except KeyboardInterrupt:
        interrupted = True
    if interrupted:
        sys.stderr.write("error: interrupted; the plans built so far are kept\n")
        return _INTERRUPTED
    return 1 if any(check.outcome == "FAILED" for check in report.checks) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="check the embedded pair: some minutes less, and no check"
                      " that needs SDXL's size")  # fmt: skip
    what.add_argument("--bundle", type=Path, metavar="DIR", help="check this bundle; missing plans are built into it")
    parser.add_argument("--minutes", type=_minutes, default=MINUTES, metavar="N", help="stop after this time (default"
                        f" {MINUTES:.0f}); plans are kept for the next run")  # fmt: skip
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="run only the checks whose name"
                        " contains this; may be repeated")  # fmt: skip
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="folder of the pair, of report.json and of"
                        f" report.md (default {OUT})")  # fmt: skip
    parser.add_argument("--look", action="store_true", help="only print the extras that the driver runs; run no checks")
    parser.add_argument("--debug", action="store_true", help="print every process's stderr: tracebacks, messages")
    return parser


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < 24 * 60:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of minutes above 0, at most a day")
    return minutes


def _chosen(checks: Sequence[Check], only: Sequence[str]) -> list[Check]:
    for text in only:
        if not any(text in check.name for check in checks):
            raise UsageError(f"--only {text!r}: no check's name contains it; for example: {checks[0].name}")
    return [check for check in checks if not only or any(text in check.name for text in only)]


def _has_plans(bundle: Path) -> bool:
    try:
        return bool(read_bundle(bundle, partial=True).manifest.plans)
    except SdxlTrtError:
        return False


def _checked(
    arguments: argparse.Namespace, checks: Sequence[Check], runner: Callable[[Path], Runner] | None
) -> tuple[GpuReport, bool]:
    """Run `checks` in a new workplace, and return the report and whether an interrupt ended the run before the end."""
    with tempfile.TemporaryDirectory(prefix="sdxl-trt-gpu-") as name:
        folder = Path(name)
        model = _prepare(folder, arguments)
        processes = ProcessRunner(folder, debug=arguments.debug)
        facts = processes.facts() if runner is None else gpu_facts()
        run = processes if runner is None else runner(folder)
        results, interrupted = _until_interrupted(checks, run_checks(checks, run, arguments.minutes * 60, _say))
        place = Workplace(folder)  # how a process ended may name a path, too
        results = [msgspec.structs.replace(each, seen=place.without_paths(each.seen)) for each in results]
    report = GpuReport(
        date=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        gpu=facts.get("GPU", "").partition(", compute capability")[0],
        model=model,
        facts=facts,
        checks=tuple(results),
    )
    return report, interrupted


def _until_interrupted(checks: Sequence[Check], results: Iterable[CheckResult]) -> tuple[list[CheckResult], bool]:
    """Return the results of `checks`, and whether an interrupt came: those that had not finished were then not run."""
    found: list[CheckResult] = []
    try:
        for result in results:
            found.append(result)  # noqa: PERF402 - what was found before an interrupt is kept
    except KeyboardInterrupt:
        rest = [CheckResult(check.name, "not run", 0.0, "the run was interrupted") for check in checks[len(found) :]]
        return found + rest, True
    return found, False


def _prepare(folder: Path, arguments: argparse.Namespace) -> str:
    """Make the workplace in `folder`, and return what is checked. Raises UsageError without the pair."""
    if arguments.bundle is not None:
        read_bundle(arguments.bundle)
        make_workplace(folder, arguments.bundle, ours=False)
        return "a given bundle"
    if arguments.quick:
        make_workplace(folder, ours=True)
        return "the embedded pair"
    pair, second = arguments.out / PAIR, arguments.out / SECOND
    if not pair.is_dir():
        raise UsageError(f"{pair}: there is no pair to check; make it with: {make_command(arguments.out)}, or give"
                         " --quick for the embedded one")  # fmt: skip
    make_workplace(folder, pair, ours=True, other_opset=second, eight_bit=arguments.out / EIGHT_BIT)
    return "a pair of SDXL's size with random weights"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
