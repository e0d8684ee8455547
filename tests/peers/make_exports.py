"""Export the pairs that the peers' tests load, in the project's own environment: make_exports.py FOLDER."""

import shutil
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from small_models.pairs import SHAPES, make_pair

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.export import Options, export_bundle
from sdxl_trt.export.optimum.layout import write_optimum
from sdxl_trt.export.sources.source import BASE_CLASS, REFINER_CLASS, open_pipeline
from sdxl_trt.mini import materialize
from sdxl_trt.mini.embedded import bundle_path

HALF = Options(precision="fp16", vae_precision="fp16", opset=20)


def _write(folder: Path, bundle: Path) -> None:
    base, refiner = open_pipeline(folder / "base", BASE_CLASS), open_pipeline(folder / "refiner", REFINER_CLASS)
    write_optimum(read_bundle(bundle), base, refiner, folder / "optimum")


def main(folder: Path) -> None:
    """Write outline, apart, legacy (fp32), half (all fp16, opset 20) and mini (the embedded bundle)."""
    warnings.simplefilter("ignore")
    for name in ("outline", "apart", "legacy"):
        pair = folder / name
        make_pair(pair, SHAPES[name])
        export_bundle(pair / "base", pair / "refiner", pair / "bundle", Options(precision="fp32"))
        _write(pair, pair / "bundle")
    half, outline = folder / "half", folder / "outline"
    for stage in ("base", "refiner"):
        shutil.copytree(outline / stage, half / stage)
    export_bundle(half / "base", half / "refiner", half / "bundle", HALF)
    _write(half, half / "bundle")
    materialize(folder / "mini")
    shutil.copytree(bundle_path(), folder / "mini" / "bundle")
    _write(folder / "mini", folder / "mini" / "bundle")
    (folder / ".done").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
