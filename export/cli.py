"""export-engines: parse, call, report; no logic."""

__all__ = ["main"]

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from sdxl_trt.engines.command import Parser, one_line, print_json, run
from sdxl_trt.engines.errors import UsageError

EPILOG = """examples:
  export-engines --fp16                                   the embedded pair, to ./sdxl-bundle
  export-engines --base sdxl-base --refiner sdxl-refiner --out my-bundle --fp16
  export-engines --base my-fine-tune --no-refiner --out base-only --fp32
"""


def main(argv: list[str] | None = None) -> int:
    """Run export-engines and return its exit code."""
    return run(_parser(), _export, argv)


def _parser() -> Parser:
    parser = Parser(
        prog="export-engines",
        description="Convert an SDXL base and refiner to a bundle of ONNX graphs that trt-generate runs without torch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_argument_group("sources (a diffusers folder with safetensors, or 'mini' for the embedded pair)")
    source.add_argument("--base", metavar="SRC", help="StableDiffusionXLPipeline folder (default: mini)")
    refiner = source.add_mutually_exclusive_group()
    refiner.add_argument("--refiner", metavar="SRC", help="StableDiffusionXLImg2ImgPipeline folder (with mini: mini)")
    refiner.add_argument("--no-refiner", action="store_true", help="export the base alone")
    target = parser.add_argument_group("bundle")
    target.add_argument(
        "--out", type=Path, default=Path("sdxl-bundle"), metavar="DIR", help="folder to write or replace"
    )
    precision = target.add_mutually_exclusive_group()
    precision.add_argument(
        "--fp16", dest="precision", action="store_const", const="fp16", help="half precision (default)"
    )
    precision.add_argument("--fp32", dest="precision", action="store_const", const="fp32", help="single precision")
    target.add_argument("--vae-precision", choices=("auto", "fp32", "fp16"), default="auto",
                        help="auto: fp32 where the autoencoder's config says force_upcast")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--debug", action="store_true", help="add the traceback to an error")
    parser.set_defaults(precision="fp16")
    return parser


def _export(arguments: argparse.Namespace) -> None:
    # The exporter is serial Python; threads that spin between its small tensors only take time from it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from sdxl_trt.export.components import Options  # noqa: PLC0415 - torch: --help must not wait for it
    from sdxl_trt.export.exporter import export_bundle  # noqa: PLC0415

    started = time.perf_counter()
    base, refiner = _sources(arguments)
    options = Options(precision=arguments.precision, vae_precision=arguments.vae_precision)
    try:
        bundle = export_bundle(base, refiner, arguments.out, options, progress=_show)
    finally:
        _clear()
    seconds = time.perf_counter() - started
    report = _report(bundle, seconds)
    if arguments.json:
        print_json(report)
    else:
        _tell(report)


def _sources(arguments: argparse.Namespace) -> tuple[str, str | None]:
    """Return base and refiner; the embedded halves belong together, so neither completes a model of the user's."""
    base: str | None = arguments.base
    refiner: str | None = arguments.refiner
    if base is None and refiner not in (None, "mini"):
        raise UsageError(f"--refiner {refiner} without --base: name the base that it refines")
    if refiner is None and base in (None, "mini"):
        refiner = "mini"
    if "" in (base, refiner):
        raise UsageError("--base and --refiner take a folder or mini, not an empty name; is a variable unset?")
    return "mini" if base is None else base, None if arguments.no_refiner else refiner


def _show(component: str, stage: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{component}: {stage}")
        sys.stderr.flush()


def _clear() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()


def _report(bundle: Any, seconds: float) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.root),
        "seconds": seconds,
        "components": {
            name: {
                "kind": component.kind,
                "precision": component.precision,
                "parameters": component.parameters,
                "bytes": component.graph.size + component.weights.size,
                "sha256": component.weights.sha256,
            }
            for name, component in manifest.components.items()
        },
        "refiner": manifest.refiner is not None,
        "note": manifest.note,
    }


def _tell(report: dict[str, Any]) -> None:
    for name, part in report["components"].items():
        line = f"  {name:<24} {part['precision']}  {part['parameters'] / 1e6:9.2f} M  {part['bytes'] / 2**20:9.1f} MiB"
        sys.stdout.write(line + "\n")
    total = sum(part["bytes"] for part in report["components"].values()) / 2**20
    sys.stdout.write(f"{report['bundle']}: {total:.1f} MiB in {report['seconds']:.0f} s\n")
    if report["note"]:
        sys.stdout.write(f"note: {one_line(report['note'])}\n")
    sys.stdout.write(f'next: trt-generate "a prompt" --engines {report["bundle"]}\n')


if __name__ == "__main__":
    sys.exit(main())
