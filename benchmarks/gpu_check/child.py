"""One check in a process of its own: ``python -m sdxl_trt.benchmarks.gpu_check.child FOLDER NAME``, started by runner.

It writes its result as one line of JSON to stdout; whatever else would go there goes to stderr. Without NAME it writes
the machine's facts. It ends with its parent: when stdin closes, the process exits, whatever a library is doing.
"""

__all__ = ["FACTS", "main", "run_check"]

import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sdxl_trt.benchmarks.gpu_check.checks import Check, Failed, Finding, Skipped, Workplace, all_checks
from sdxl_trt.benchmarks.measure import CheckResult, Outcome, gpu_facts
from sdxl_trt.engines.host import one_line

FACTS = "facts"
MOST_SEEN = 2000


def run_check(check: Check, workplace: Workplace) -> CheckResult:
    """Run one check and return its result; an exception becomes a failure."""
    started = time.perf_counter()
    outcome: Outcome = "ok"
    try:
        found = check.run(workplace)
    except Skipped as exc:
        outcome, found = "skipped", Finding(str(exc))
    except Failed as exc:
        outcome, found = "FAILED", exc.found
    except Exception as exc:  # noqa: BLE001 - any error is reported
        outcome, found = "FAILED", Finding(f"{type(exc).__name__}: {exc}")
        traceback.print_exc()
    # JSON has no NaN and no infinity: they would become null, which no reader takes for a number.
    figures = tuple(figure for figure in found.figures if math.isfinite(figure.value))
    seen = one_line(workplace.without_paths(found.seen))[:MOST_SEEN]
    return CheckResult(check.name, outcome, time.perf_counter() - started, seen, figures)


def main(argv: Sequence[str]) -> int:
    """Run the check that `argv` names, write its result, and return the exit code: 0, unless there is no such check."""
    folder, name = argv
    channel = os.dup(1)
    os.dup2(2, 1)  # libraries print; only the result belongs on stdout
    threading.Thread(target=_end_with_parent, daemon=True).start()
    result: dict[str, str] | CheckResult
    if name == FACTS:
        result = gpu_facts()
    else:
        (check,) = [each for each in all_checks() if each.name == name]
        result = run_check(check, Workplace(Path(folder)))
    with os.fdopen(channel, "wb") as out:
        out.write(msgspec.json.encode(result) + b"\n")
    return 0


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    # A driver's or a library's destructors may hang or crash; the result is written, and nothing else is left to do.
    os._exit(code)
