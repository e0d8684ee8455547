"""Export a pair of checkpoints, then draw with the bundle: ``python examples/export_and_run.py BASE REFINER BUNDLE``.

A source is a diffusers folder, a .safetensors file, a Hub id, or ``mini``, the embedded pair. Exporting needs torch.
"""

import sys
from pathlib import Path

from sdxl_trt import Request, export_bundle, open_bundle
from sdxl_trt.export import Options


def export_and_run(base: str, refiner: str, bundle: Path, prompt: str, path: Path) -> None:
    """Export `base` and `refiner` to `bundle` in fp16, unless it is there and unchanged, and draw `prompt`."""
    export_bundle(base, refiner, bundle, Options(precision="fp16"))
    with open_bundle(bundle) as pipeline:
        for picture in pipeline.generate(Request(prompt, steps=30, handoff=0.8, seed=7)):
            picture.save(path)


if __name__ == "__main__":
    base, refiner, folder = sys.argv[1:4] if len(sys.argv) > 3 else ("mini", "mini", "my-bundle")
    export_and_run(base, refiner, Path(folder), "a large red star on a blue background", Path("export_and_run.png"))
