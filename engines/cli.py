"""trt-inspect: parse, call, report; no logic."""

__all__ = ["main"]

import argparse
import sys
from pathlib import Path

from sdxl_trt.engines.host import Parser, ProgressLine, print_json, run

EPILOG = """examples:
  trt-inspect my-bundle                      graphs, plans, memory, keys
  trt-inspect my-bundle --why-rebuild        which plans work on this machine, and why others do not
  trt-inspect --doctor                       which providers can start on this machine; exit 3 if none uses a GPU
  trt-inspect my-bundle --verify ort         TensorRT against ONNX Runtime; exit 1 if they differ
"""


def main(argv: list[str] | None = None) -> int:
    """Run trt-inspect and return its exit code."""
    return run(_parser(), _inspect, argv)


def _parser() -> Parser:
    parser = Parser(
        prog="trt-inspect",
        description="Show what a bundle contains, what would be rebuilt here and why, and whether its plans are right;"
        " or what can start on this machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="exported folder")
    subject.add_argument(
        "--doctor", action="store_true", help="say what can start on this machine, and the one line that mends the rest"
    )
    parser.add_argument(
        "--why-rebuild", action="store_true", help="state for each component whether its plan works here, or why not"
    )
    parser.add_argument("--verify", choices=("ort",), help="compare plans with ONNX Runtime, component by component")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--debug", action="store_true", help="add the traceback to an error")
    return parser


def _inspect(arguments: argparse.Namespace) -> None:
    if arguments.doctor:
        _examine(arguments)
        return
    from sdxl_trt.engines.inspection import inspect_bundle  # noqa: PLC0415 - numpy and more: --help must not wait

    with ProgressLine() as line:
        report = inspect_bundle(
            arguments.bundle, why_rebuild=arguments.why_rebuild, verify=arguments.verify is not None,
            progress=lambda component: line.draw("verify", f"comparing {component}"),
        )  # fmt: skip
    if arguments.json:
        print_json(report.json)
    else:
        sys.stdout.write("".join(f"{line}\n" for line in report.lines))
    report.require()


def _examine(arguments: argparse.Namespace) -> None:
    from sdxl_trt.engines.errors import UsageError  # noqa: PLC0415
    from sdxl_trt.engines.inspection import examine_machine  # noqa: PLC0415

    if arguments.why_rebuild or arguments.verify:
        raise UsageError("--doctor examines the machine, and --why-rebuild and --verify a bundle; give them without it")
    report = examine_machine()
    if arguments.json:
        print_json(report.json)
    else:
        sys.stdout.write("".join(f"{line}\n" for line in report.lines))
    report.require()


if __name__ == "__main__":
    sys.exit(main())
