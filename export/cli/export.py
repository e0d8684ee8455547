"""export-engines: parse, call, report; no logic."""

__all__ = ["main"]

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

from sdxl_trt.engines import SdxlTrtError, UsageError
from sdxl_trt.engines.host import Output, Parser, ProgressLine, print_json, run
from sdxl_trt.export.cli.eight_bit import add_eight_bit_options, calibration_options
from sdxl_trt.export.cli.options import PlanOptions, add_plan_options, plan_options

EPILOG = """examples:
  export-engines --fp16                                   the embedded pair, to ./sdxl-bundle
  export-engines --base sd_xl_base_1.0.safetensors --refiner sd_xl_refiner_1.0.safetensors --out sdxl --verify
  export-engines --base stabilityai/stable-diffusion-xl-base-1.0 --no-refiner --lora style.safetensors:0.8:0.5
  export-engines --engine tensorrt --out sdxl             plans for the existing bundle, on this GPU
  export-engines --base my-fine-tune --no-refiner --vae madebyollin/sdxl-vae-fp16-fix --out mine --dry-run
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
    source = parser.add_argument_group(
        "sources (SRC: a diffusers folder, a .safetensors checkpoint, a hub id owner/name[@revision], or mini)"
    )
    source.add_argument("--base", metavar="SRC", help="the base (default: mini, the embedded pair)")
    refiner = source.add_mutually_exclusive_group()
    refiner.add_argument("--refiner", metavar="SRC", help="the refiner (default: mini with base mini, else none)")
    refiner.add_argument("--no-refiner", action="store_true", help="export only the base")
    source.add_argument("--unet", metavar="SRC", help="use another UNet for the base, for example SDXL-Lightning's")
    source.add_argument("--vae", metavar="SRC", help="use another autoencoder, for example sdxl-vae-fp16-fix")
    source.add_argument("--tiny-vae", metavar="SRC", help="add a small decoder for quick pictures and previews"
                        " (trt-generate --vae tiny), for example madebyollin/taesdxl")  # fmt: skip
    source.add_argument("--lora", action="append", default=[], metavar="FILE[:UNET[:TE]]",
                        help="fuse a LoRA into the base, with its scales on the UNet (default 1) and on the text"
                        " encoders (default: the UNet's); may be repeated")  # fmt: skip
    source.add_argument("--controlnet", action="append", default=[], metavar="SRC",
                        help="add a ControlNet for the base (trt-generate --control); may be repeated")  # fmt: skip
    _add_target(parser.add_argument_group("bundle"))
    add_eight_bit_options(parser.add_argument_group("8 bits (--int8, --fp8, --vae-precision int8)"))
    add_plan_options(parser.add_argument_group("plans (without a source, for the existing bundle at --out)"))
    parser.add_argument("--verify", action="store_true", help="compare every graph with PyTorch; exit 1 if one differs")
    parser.add_argument("--force", action="store_true", help="export unchanged components too")
    parser.add_argument("--no-lock", action="store_true", help="write without a lock, for file systems without locks")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and needed; write nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--debug", action="store_true", help="add the traceback to an error")
    parser.set_defaults(precision="fp16")
    return parser


def _add_target(group: Any) -> None:
    group.add_argument("--out", type=Path, default=Path("sdxl-bundle"), metavar="DIR", help="folder to make or replace")
    precision = group.add_mutually_exclusive_group()
    for name, meaning in (("fp16", "half precision (default)"), ("bf16", "bfloat16, for TensorRT"),
                          ("fp32", "single precision"), ("int8", "UNets in 8 bits, the rest in half precision"),
                          ("fp8", "UNets and attention in 8-bit floats, for GPUs since Ada")):  # fmt: skip
        precision.add_argument(f"--{name}", dest="precision", action="store_const", const=name, help=meaning)
    group.add_argument("--vae-precision", choices=("auto", "fp32", "bf16", "fp16", "mixed", "int8"), default="auto",
                       help="auto: fp32 if the autoencoder's config sets force_upcast, else the chosen precision;"
                       " mixed: fp16 with the end of the decoder in fp32; int8: the decoder in 8 bits")  # fmt: skip
    group.add_argument("--components", type=_names, metavar="LIST", help="export only these, separated by commas; keep"
                       " the bundle's other components")  # fmt: skip
    group.add_argument("--layout", choices=("bundle", "optimum"), default="bundle",
                       help="optimum: two folders, base and refiner, for optimum-onnx")  # fmt: skip
    group.add_argument("--opset", type=int, default=23, metavar="N", help="ONNX operator set, 20 to 23 (default 23)")


def _names(text: str) -> list[str]:
    return list(filter(None, text.split(",")))


def _export(arguments: argparse.Namespace) -> None:
    # The exporter is serial Python; threads that spin between its small tensors only slow it down.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    plans = plan_options(arguments, _tensorrt_can_run)
    if plans is not None and _builds_plans_only(arguments):
        _build(arguments, plans)
        return
    base, refiner = _sources(arguments)
    options = _options(arguments, twins=plans is not None)
    from sdxl_trt.export import exporter  # noqa: PLC0415 - torch: --help must not wait for it
    from sdxl_trt.export.cli import summary  # noqa: PLC0415 - torch: --help must not wait for it

    if arguments.dry_run:
        plan = exporter.plan_export(base, refiner, arguments.out, options, own_tiny=arguments.layout != "optimum")
        if arguments.layout == "optimum":
            exporter.check_optimum(plan)
        output = summary.of_plan(plan)
        lines = output.lines if plans is None else [*output.lines, f"then {plans.told}"]
        _print(arguments, Output(lines, output.json))
        return
    started = time.perf_counter()
    export = exporter.export_optimum if arguments.layout == "optimum" else exporter.export_bundle
    with ProgressLine() as line:
        exported = export(base, refiner, arguments.out, options, progress=summary.export_progress(line))
    output = summary.of_export(exported, arguments.out, time.perf_counter() - started)
    if plans is None:
        _print(arguments, output)
        return
    if not arguments.json:
        _print(arguments, output)
    _build(arguments, plans, output.json)


def _tensorrt_can_run() -> bool:
    """Return whether plans can be built here by default: TensorRT is installed and there is a GPU."""
    if importlib.util.find_spec("tensorrt") is None:
        return False
    from sdxl_trt.engines.backends.trt import current_environment  # noqa: PLC0415 - loads CUDA

    try:
        current_environment("tensorrt")
    except SdxlTrtError:
        return False
    return True


def _builds_plans_only(arguments: argparse.Namespace) -> bool:
    """Return whether to build plans for an existing bundle only: an engine is named, but no model."""
    from sdxl_trt.engines.bundle import MANIFEST  # noqa: PLC0415 - --help must not wait for it

    named = (arguments.base, arguments.refiner, arguments.unet, arguments.vae, arguments.tiny_vae)
    there = (arguments.out / MANIFEST).is_file()
    return (
        arguments.engine is not None
        and there
        and named == (None,) * len(named)
        and not (arguments.lora or arguments.controlnet)
    )


def _build(arguments: argparse.Namespace, plans: PlanOptions, exported: dict[str, Any] | None = None) -> None:
    """Build the plans and print them; `exported`, the export's JSON if any, is printed in the same object."""
    from sdxl_trt.engines.backends.trt import current_environment  # noqa: PLC0415 - loads CUDA
    from sdxl_trt.engines.build import (  # noqa: PLC0415
        build_plans,
        build_progress,
        drop_onnx,
        plan_builds,
    )
    from sdxl_trt.engines.bundle import read_bundle  # noqa: PLC0415
    from sdxl_trt.export.cli import summary  # noqa: PLC0415

    bundle = read_bundle(arguments.out, partial=True)
    sizes, started = plans.sizes(bundle.manifest), time.perf_counter()
    if arguments.dry_run:
        jobs = plan_builds(bundle, current_environment(plans.flavour), sizes, plans.flags,
                           components=arguments.components, force=arguments.force,
                           lora_rank=plans.lora_rank)  # fmt: skip
        _print(arguments, summary.of_jobs(jobs))
        return
    with ProgressLine() as line:
        bundle = build_plans(arguments.out, plans.flavour, sizes, plans.flags, components=arguments.components,
                             timing_cache=plans.timing_cache, force=arguments.force, lock=not arguments.no_lock,
                             lora_rank=plans.lora_rank, progress=build_progress(line))  # fmt: skip
    if plans.plans_only:
        bundle = drop_onnx(bundle)
    output = summary.of_plans(bundle, plans.flavour, time.perf_counter() - started)
    _print(arguments, Output(output.lines, {**(exported or {}), **output.json}))


def _print(arguments: argparse.Namespace, output: Any) -> None:
    if arguments.json:
        print_json(output.json)
    else:
        sys.stdout.write("".join(f"{line}\n" for line in output.lines))


def _options(arguments: argparse.Namespace, *, twins: bool) -> Any:
    from sdxl_trt.engines.adapters import parse_lora_option  # noqa: PLC0415
    from sdxl_trt.export.components import Options  # noqa: PLC0415 - torch: --help must not wait for it

    return Options(
        precision=arguments.precision,
        vae_precision=arguments.vae_precision,
        calibration=calibration_options(arguments),
        twins=twins,
        opset=arguments.opset,
        unet=arguments.unet,
        vae=arguments.vae,
        tiny_vae=arguments.tiny_vae,
        loras=tuple(parse_lora_option(text) for text in arguments.lora),
        controlnets=tuple(arguments.controlnet),
        components=None if arguments.components is None else frozenset(arguments.components),
        verify=arguments.verify,
        force=arguments.force,
        lock=not arguments.no_lock,
    )


def _sources(arguments: argparse.Namespace) -> tuple[str, str | None]:
    """Return base and refiner; the embedded pair is never combined with a model of the user's."""
    base: str | None = arguments.base
    refiner: str | None = arguments.refiner
    if base is None and refiner not in (None, "mini"):
        raise UsageError(f"--refiner {refiner} without --base: name the base of this refiner")
    if base is None and arguments.unet is not None:
        raise UsageError(f"--unet {arguments.unet} without --base: name the base of this UNet")
    if refiner is None and base in (None, "mini"):
        refiner = "mini"
    if "" in (base, refiner):
        raise UsageError("--base and --refiner need a source, not an empty name; is a variable unset?")
    return "mini" if base is None else base, None if arguments.no_refiner else refiner


if __name__ == "__main__":
    sys.exit(main())
