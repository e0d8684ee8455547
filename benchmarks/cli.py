"""trt-bench: parse, call, report; no logic."""

__all__ = ["main"]

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_trt.engines.host import Parser, ProgressLine, one_line, option_type, print_json, run
from sdxl_trt.runtime.request import parse_size

if TYPE_CHECKING:
    from sdxl_trt.benchmarks.measure import Say, Subject
    from sdxl_trt.benchmarks.report import BenchReport

EPILOG = """examples:
  trt-bench --quick                                          the embedded pair, in a minute or two
  trt-bench --engines sdxl --model sd_xl_base_1.0.safetensors --refiner sd_xl_refiner_1.0.safetensors --components
  trt-bench --against eager,compile --size 1024x1024 --runs 15 --out results
  trt-bench --quality                                        how far every precision is from PyTorch, on this machine
  trt-bench --estimate h100                                  a lower bound for a GPU you do not have; runs nothing
"""
_QUICK_STEPS, _STEPS = 5, 30
_QUICK_RUNS, _RUNS = 3, 7


def main(argv: list[str] | None = None) -> int:
    """Run trt-bench and return its exit code."""
    return run(_parser(), lambda arguments: _run(arguments, sys.argv[1:] if argv is None else argv), argv)


def _parser() -> Parser:
    parser = Parser(
        prog="trt-bench",
        description="Measure time, memory and quality against PyTorch and others, on the same weights and noise.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to measure (default: the embedded pair)")
    what.add_argument("--engines", type=Path, metavar="BUNDLE", help="exported bundle (default: export --model first)")
    what.add_argument("--model", metavar="SRC", help="base checkpoint for PyTorch: folder, .safetensors, hub id, mini")
    what.add_argument("--refiner", metavar="SRC", help="refiner checkpoint for PyTorch")
    what.add_argument("--against", metavar="LIST", help="contestants, separated by commas, or none (default: all):"
                      " sdxl-trt-int8, sdxl-trt-openvino, sdxl-trt-fast, sdxl-trt-fastest, sdxl-trt-fastest-openvino,"
                      " onnxruntime, eager, eager-bf16, eager-fp16, compile, compile-bf16, diffusers, optimum,"
                      " openvino, openvino-bf16, openvino-int8, openvino-int8-scoped, openvino-int8-bf16,"
                      " ort-cuda, ort-tensorrt, tensorrt")  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument("--steps", type=int, metavar="N", help=f"steps per picture (default {_STEPS})")
    how.add_argument("--size", type=option_type(parse_size), metavar="WxH", help="pixels (default: the model's own)")
    how.add_argument("--batch", type=int, default=1, metavar="N", help="pictures per batch (default 1)")
    how.add_argument("--runs", type=int, metavar="R", help=f"timed rounds (default {_RUNS})")
    how.add_argument("--components", action="store_true", help="also time each component, sweep size, batch and"
                     " handoff, and time cold starts")  # fmt: skip
    how.add_argument("--quality", action="store_true", help="compare with PyTorch in fp32 at the same noise; exit 1"
                     " if a limit is missed")  # fmt: skip
    how.add_argument("--quick", action="store_true", help="few steps and rounds; skip contestants that take minutes"
                     " to prepare")  # fmt: skip
    how.add_argument("--gpu-check", type=Path, metavar="FILE", help="show the figures of a report.json that gpu-check"
                     " wrote, on any machine, beside this run's")  # fmt: skip
    how.add_argument("--estimate", metavar="GPU", help="only estimate a lower bound: h100, a100, l40s, a10g or 4090")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.json, report.md and report.html to DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--debug", action="store_true", help="add the traceback to an error")
    return parser


def _run(arguments: argparse.Namespace, argv: list[str]) -> None:
    if arguments.estimate is not None:
        _estimate(arguments)
        return
    with ProgressLine() as line:
        _bench(arguments, argv, (lambda text: line.draw("bench", one_line(text))) if line.live else _say)


def _bench(arguments: argparse.Namespace, argv: list[str], say: "Say") -> None:
    import msgspec  # noqa: PLC0415 - keeps --help fast

    from sdxl_trt.benchmarks.contest import BenchOptions, run_bench  # noqa: PLC0415 - keeps --help fast
    from sdxl_trt.benchmarks.measure import bench_cache, find_subject, read_gpu_report  # noqa: PLC0415
    from sdxl_trt.benchmarks.report import markdown_report, require_matplotlib, write_pages  # noqa: PLC0415

    if arguments.out is not None:
        require_matplotlib()
    gpu = None if arguments.gpu_check is None else read_gpu_report(arguments.gpu_check)
    height, width = arguments.size or (None, None)
    quick = arguments.quick
    options = BenchOptions(
        against=arguments.against,
        steps=(_QUICK_STEPS if quick else _STEPS) if arguments.steps is None else arguments.steps,
        width=width,
        height=height,
        batch=arguments.batch,
        runs=(_QUICK_RUNS if quick else _RUNS) if arguments.runs is None else arguments.runs,
        components=arguments.components,
        sweeps=arguments.components and not quick,
        cold=arguments.components and not quick,
        quick=quick,
    )
    subject = find_subject(arguments.engines, arguments.model, arguments.refiner, bench_cache(), say)
    report = _finished(run_bench(subject, options, say), subject, arguments, argv, say)
    report = msgspec.structs.replace(report, gpu=gpu)
    if arguments.out is not None:
        write_pages(report, arguments.out)
    if arguments.json:
        print_json(report)
    else:
        sys.stdout.write(markdown_report(report))
    _require_quality(report)


def _finished(
    report: "BenchReport", subject: "Subject", arguments: argparse.Namespace, argv: list[str], say: "Say"
) -> "BenchReport":
    """Return the report with the command line added, and with the quality rows if --quality was given."""
    import msgspec  # noqa: PLC0415

    if arguments.quality:
        from sdxl_trt.benchmarks.quality import VARIANTS, measure_quality  # noqa: PLC0415 - torch comes with it

        # Exporting the other variants takes minutes the first time.
        variants = () if arguments.quick else tuple(VARIANTS)
        rows = measure_quality(subject, report.settings, variants, say)
        report = msgspec.structs.replace(report, quality=rows)
    return msgspec.structs.replace(report, command=("trt-bench", *argv))


def _require_quality(report: "BenchReport") -> None:
    """Raise VerificationError if the engines' pictures differ too much from PyTorch's."""
    if report.quality:
        from sdxl_trt.benchmarks.quality import verdict  # noqa: PLC0415
        from sdxl_trt.engines import VerificationError  # noqa: PLC0415

        wrong = verdict(report.quality)
        if wrong:
            raise VerificationError(wrong)


def _estimate(arguments: argparse.Namespace) -> None:
    from sdxl_trt.benchmarks.roofline import estimate_table, run_estimate  # noqa: PLC0415
    from sdxl_trt.engines import UsageError  # noqa: PLC0415

    if arguments.gpu_check is not None:
        raise UsageError("--gpu-check and --estimate: an estimate runs nothing that figures could be shown beside; give"
                         " one of them")  # fmt: skip
    height, width = arguments.size or (1024, 1024)
    steps = _STEPS if arguments.steps is None else arguments.steps
    found = run_estimate(
        arguments.estimate, engines=arguments.engines, steps=steps, width=width, height=height, batch=arguments.batch
    )
    if arguments.json:
        print_json(found)
    else:
        sys.stdout.write(estimate_table(found))


def _say(text: str) -> None:
    """Print stages but not single rounds: stderr is not a terminal."""
    if ": round " not in text:
        sys.stderr.write(f"{one_line(text)}\n")


if __name__ == "__main__":
    sys.exit(main())
