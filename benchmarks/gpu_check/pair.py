"""Make the pair that gpu-check checks: SDXL's base and refiner at full size, with random weights, as a bundle.

``python -m sdxl_trt.benchmarks.gpu_check.pair`` needs the environment that exports (make install), and no GPU. It takes
27 GB of disk, of which 18 GB stay, or about 36 GB with the plans that gpu-check builds, some ten minutes and 1.1 GB of
memory: benchmarks/results/export.md has the figures of the same exports. The pair is kept until the exporter would make
another one. Beside it lies a second export of the base's UNet and of the decoder for operator set 20, in which group
normalization is not one node. With ``--int8`` the pair is exported once more, its UNets in 8 bits, which runs steps of
them on the CPU to measure ranges.
"""

__all__ = ["EIGHT_BIT", "OUT", "PAIR", "SECOND", "main", "make_command", "make_pair"]

import argparse
import hashlib
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from sdxl_trt.engines import ResourceError, SdxlTrtError
from sdxl_trt.engines.bundle import MANIFEST, read_bundle
from sdxl_trt.engines.host import atomic_write

OUT = Path("out/gpu-check")
"""The default folder, in which PAIR, SECOND and, if it was asked for, EIGHT_BIT are the exports."""
PAIR, SECOND, EIGHT_BIT = "pair", "opset-20", "int8"
_RECIPE = "pair.json"
_CHECKPOINTS = "checkpoints"
_DISK, _WITH_PLANS = 27 * 10**9, 36 * 10**9
_FULL = "sdxl"
_OPSET = 20
_OTHER = frozenset({"unet", "vae_decoder_bf16"})
_MODULE = "sdxl_trt.benchmarks.gpu_check.pair"


def main(argv: Sequence[str] | None = None) -> int:
    """Make the pair if it is not there, and return the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"folder to write to (default {OUT})")
    parser.add_argument("--int8", action="store_true", help="export both UNets in 8 bits too")
    arguments = parser.parse_args(argv)
    try:
        path = make_pair(arguments.out, eight_bit=arguments.int8, say=lambda text: sys.stderr.write(f"{text}\n"))
    except SdxlTrtError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return exc.exit_code
    sys.stdout.write(f"{path}\n")
    return 0


def make_command(out: Path) -> str:
    """Return the command that makes the pair in `out`."""
    given = "" if out == OUT else f" --out {shlex.quote(str(out))}"
    return f"python -m {_MODULE}{given}"


def make_pair(
    out: Path, *, size: str = _FULL, eight_bit: bool = False, say: Callable[[str], object] = lambda _: None
) -> Path:
    """Return ``out/pair``, made unless it is there with the same recipe; the second export is ``out/opset-20``.

    With `eight_bit` there is a third, ``out/int8``. `size` is a key of the architectures; `say` receives
    what is done next. An interrupted run leaves no half-written bundle, and the next one continues. Raises
    ResourceError without enough disk, and what the exporter raises.
    """
    recipe = _recipe(size)
    if _is_made(out, recipe, (SECOND, EIGHT_BIT) if eight_bit else (SECOND,)):
        say(f"{out / PAIR}: already made")
        return out / PAIR
    out.mkdir(parents=True, exist_ok=True)
    (out / _RECIPE).unlink(missing_ok=True)
    free = shutil.disk_usage(out).free
    if size == _FULL and free < _DISK:
        raise ResourceError(f"{out}: the pair needs {_DISK / 1e9:.0f} GB of disk, about {_WITH_PLANS / 1e9:.0f} GB"
                            f" with plans, {free / 1e9:.0f} GB is free; free some, or give another --out")  # fmt: skip
    _export(out, size, say, eight_bit=eight_bit)
    with atomic_write(out / _RECIPE) as file:
        file.write(msgspec.json.encode(recipe))
    return out / PAIR


def _export(out: Path, size: str, say: Callable[[str], object], *, eight_bit: bool) -> None:
    # A GPU's environment imports this module too, and has no exporter.
    from sdxl_trt.benchmarks.full_size import ROLES, write_checkpoint  # noqa: PLC0415
    from sdxl_trt.export import Options, export_bundle  # noqa: PLC0415

    sources = out / _CHECKPOINTS
    for role in ROLES:
        if not (sources / role).is_dir():
            say(f"writing random weights: {role}")
            write_checkpoint(size, role, sources)
    say("exporting base and refiner")
    export_bundle(sources / "base", sources / "refiner", out / PAIR, Options(precision="fp16", twins=True))
    if eight_bit:
        say("exporting both UNets in 8 bits")
        quantized = Options(precision="int8")
        export_bundle(sources / "base", sources / "refiner", out / EIGHT_BIT, quantized)
    shutil.rmtree(sources / "refiner")
    say(f"exporting the base's UNet and the decoder for operator set {_OPSET}")
    options = Options(precision="fp16", twins=True, opset=_OPSET, components=_OTHER)
    export_bundle(sources / "base", None, out / SECOND, options)
    shutil.rmtree(sources)


def _recipe(size: str) -> dict[str, str]:
    """Return what the pair depends on: the models' configs, and the exporter's revision and version."""
    from sdxl_trt.benchmarks.full_size import ROLES, architecture  # noqa: PLC0415
    from sdxl_trt.export.components import REVISION  # noqa: PLC0415

    configs = [(role, architecture(size, role).models) for role in ROLES]
    digest = hashlib.sha256(msgspec.json.encode(configs, order="deterministic")).hexdigest()
    return {"size": size, "configs": digest, "revision": str(REVISION), "opset": str(_OPSET)}


def _is_made(out: Path, recipe: dict[str, str], others: Sequence[str]) -> bool:
    """Return whether the pair and the `others` are whole, with the same recipe."""
    try:
        made = msgspec.json.decode((out / _RECIPE).read_bytes(), type=dict[str, str])
        read_bundle(out / PAIR)
    except (OSError, msgspec.MsgspecError, SdxlTrtError):
        return False
    return made == recipe and all((out / name / MANIFEST).is_file() for name in others)


if __name__ == "__main__":
    sys.exit(main())
