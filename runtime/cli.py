"""trt-generate: parse, call, report; no logic."""

__all__ = ["main"]

import argparse
import sys
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_trt.engines.command import Parser, one_line, print_json, run
from sdxl_trt.engines.errors import UsageError

if TYPE_CHECKING:
    from sdxl_trt.runtime.pipeline import Picture, Pipeline
    from sdxl_trt.runtime.request import Request

EPILOG = """examples:
  trt-generate "a large red star on a blue background" -o star.png
  trt-generate "a red fox" --engines my-bundle --steps 30 --handoff 0.8 --seed 7
  trt-generate "a red fox" --engines my-bundle --no-refiner -n 4 --json
"""


def main(argv: list[str] | None = None) -> int:
    """Run trt-generate and return its exit code."""
    return run(_parser(), _generate, argv)


def _parser() -> Parser:
    parser = Parser(
        prog="trt-generate",
        description="Generate pictures from an exported SDXL bundle: base, handoff, refiner; no torch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what the picture shows")
    _add_prompt_options(parser)
    _add_run_options(parser)
    _add_engine_options(parser)
    return parser


def _add_prompt_options(parser: Parser) -> None:
    group = parser.add_argument_group("prompt and picture")
    group.add_argument("--prompt-2", metavar="TEXT", help="what the base's second encoder reads instead")
    group.add_argument("--negative", metavar="TEXT", help='what to stay away from; none is not the same as ""')
    group.add_argument("--negative-2", metavar="TEXT", help="the same for the second encoder")
    group.add_argument("--width", type=int, metavar="W", help="pixels (default: the model's)")
    group.add_argument("--height", type=int, metavar="H", help="pixels (default: the model's)")
    group.add_argument("-n", dest="count", type=int, metavar="COUNT", help="pictures, with seeds N, N+1, … (default 1)")
    group.add_argument("--seed", type=int, metavar="N", help="0 to 2^64-1 (default: drawn and printed)")
    group.add_argument("-o", dest="out", type=Path, metavar="FILE", help="PNG to write (default sdxl-<seed>.png)")
    group.add_argument("--no-metadata", action="store_true", help="write pictures without their settings")


def _add_run_options(parser: Parser) -> None:
    group = parser.add_argument_group("denoising")
    group.add_argument("--steps", type=int, default=30, metavar="N", help="steps of base and refiner together (30)")
    where = group.add_mutually_exclusive_group()
    where.add_argument("--handoff", type=_handoff, default="auto", metavar="F|none",
                       help="share of the noise range that the base denoises (default 0.8)")  # fmt: skip
    where.add_argument("--handoff-step", type=int, metavar="K", help="hand over after K steps")
    where.add_argument("--no-refiner", action="store_true", help="the base alone, as --handoff none")
    group.add_argument("--guidance", type=float, default=5.0, metavar="G", help="classifier-free guidance (5.0)")
    group.add_argument("--refiner-guidance", type=float, metavar="G", help="the refiner's (default: the base's)")
    group.add_argument("--sampler", default="euler", metavar="NAME", help="euler")
    group.add_argument("--aesthetic-score", type=float, default=6.0, metavar="A", help="told to the refiner (6.0)")
    group.add_argument("--negative-aesthetic-score", type=float, default=2.5, metavar="A", help="of the negative (2.5)")
    group.add_argument("--latents", type=Path, metavar="FILE.npy", help="initial noise, float32 of unit variance")
    group.add_argument("--save-latents", type=Path, metavar="FILE.npz", help="write initial, handoff and final latents")


def _add_engine_options(parser: Parser) -> None:
    group = parser.add_argument_group("engines")
    group.add_argument("--engines", type=Path, metavar="BUNDLE", help="exported folder (default: the embedded pair)")
    group.add_argument("--provider", choices=("auto", "ort-cpu"), default="auto", help="what runs the graphs")
    group.add_argument("--residency", choices=("auto", "resident", "swap"), default="auto",
                       help="swap: one expert in memory at a time; auto: swap where both do not fit")  # fmt: skip
    group.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    group.add_argument("--debug", action="store_true", help="add the traceback to an error")


def _handoff(text: str) -> float | str | None:
    if text in ("auto", "none"):
        return "auto" if text == "auto" else None
    try:
        return float(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a fraction between 0 and 1 nor none") from exc


def _generate(arguments: argparse.Namespace) -> None:
    from sdxl_trt.runtime.pipeline import open_bundle  # noqa: PLC0415 - numpy and more: --help must not wait for it
    from sdxl_trt.runtime.progress import ProgressBar  # noqa: PLC0415

    started = time.perf_counter()
    _check_out(arguments)
    request = _request(arguments)
    with open_bundle(arguments.engines, provider=arguments.provider, residency=arguments.residency) as pipeline:
        steps = pipeline.steps(request)
        if not arguments.json and pipeline.manifest.note:
            sys.stderr.write(f"note: {one_line(pipeline.manifest.note)}\n")
        images = []
        with ProgressBar() as bar:
            for step in steps:
                bar.show(step.stage, step.index, step.total, step.seconds)
                if step.picture is not None:
                    images.append(_save(step.picture, _target(arguments, pipeline, step.pictures.start), arguments))
        _save_latents(arguments.save_latents, pipeline)
        report = _report(pipeline, images, time.perf_counter() - started)
    if arguments.json:
        print_json(report)
    else:
        _tell(report)


def _check_out(arguments: argparse.Namespace) -> None:
    """Find out before the work whether its results can be kept."""
    endings = {"-o": (arguments.out, ".png"), "--save-latents": (arguments.save_latents, ".npz")}
    for option, (path, ending) in endings.items():
        if path is None:
            continue
        if path.suffix.lower() != ending:
            raise UsageError(f"{option} {path}: give a name that ends in {ending}")
        if path.is_dir() or not path.parent.is_dir():
            raise UsageError(f"{option} {path}: is not a file in an existing folder; make the folder first")


def _request(arguments: argparse.Namespace) -> "Request":
    from sdxl_trt.runtime.request import Request  # noqa: PLC0415

    return Request(
        prompt=arguments.prompt,
        prompt_2=arguments.prompt_2,
        negative=arguments.negative,
        negative_2=arguments.negative_2,
        steps=arguments.steps,
        handoff=None if arguments.no_refiner else arguments.handoff,
        handoff_step=arguments.handoff_step,
        guidance=arguments.guidance,
        refiner_guidance=arguments.refiner_guidance,
        sampler=arguments.sampler,
        aesthetic_score=arguments.aesthetic_score,
        negative_aesthetic_score=arguments.negative_aesthetic_score,
        seed=arguments.seed,
        count=arguments.count,
        width=arguments.width,
        height=arguments.height,
        latents=_load_latents(arguments.latents),
    )


def _load_latents(path: Path | None) -> Any:
    if path is None:
        return None
    import numpy as np  # noqa: PLC0415

    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as exc:
        raise UsageError(f"--latents {path}: not a .npy file of numbers ({exc})") from exc
    if not isinstance(array, np.ndarray):
        raise UsageError(f"--latents {path}: is an .npz; save one of its arrays (initial) with numpy.save")
    return array


def _target(arguments: argparse.Namespace, pipeline: "Pipeline", index: int) -> Path:
    """Return the file of picture `index`: -o itself for one picture, numbered beside it for several."""
    seeds = pipeline.run.request.seeds if pipeline.run else (0,)
    path: Path = arguments.out or Path(f"sdxl-{seeds[0]}.png")
    return path if len(seeds) == 1 else path.with_name(f"{path.stem}-{index}{path.suffix}")


def _save(picture: "Picture", path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    picture.save(path, metadata=not arguments.no_metadata)
    width, height = picture.image.size
    return {"path": str(path), "seed": picture.seed, "width": width, "height": height}


def _save_latents(path: Path | None, pipeline: "Pipeline") -> None:
    run = pipeline.run
    if path is None or run is None:
        return
    import numpy as np  # noqa: PLC0415

    from sdxl_trt.engines.files import atomic_write  # noqa: PLC0415

    arrays = {"initial": run.initial, "final": run.final}
    if run.handoff is not None:
        arrays["handoff"] = run.handoff
    with atomic_write(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def _report(pipeline: "Pipeline", images: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    run, pool = pipeline.run, pipeline.pool
    components = pipeline.manifest.components
    timings = run.timings if run else {}
    place = run.place if run else None
    return {
        "images": images,
        "timings": {
            "total": seconds,
            **{stage: {"seconds": sum(each), "steps": each} for stage, each in timings.items()},
        },
        "handoff": {"step": place.step, "timestep": place.timestep, "sigma": place.sigma} if place else None,
        "engines": [
            {
                "component": name,
                "provider": pool.provider,
                "precision": components[name].precision,
                "digest": components[name].graph.sha256,
            }
            for name in pool.loads
        ],
        "residency": pool.residency,
        "note": pipeline.manifest.note,
    }


def _tell(report: dict[str, Any]) -> None:
    for image in report["images"]:
        sys.stdout.write(f"{image['path']}  seed {image['seed']}  {image['width']}x{image['height']}\n")
    place = report["handoff"]
    how = f"handoff after step {place['step']} at sigma {place['sigma']:.3f}" if place else "base alone"
    sys.stderr.write(f"{how}; {report['timings']['total']:.1f} s\n")


if __name__ == "__main__":
    sys.exit(main())
