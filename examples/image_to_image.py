"""A picture from another one: ``python examples/image_to_image.py photo.png "a yellow star" out.png``.

Without a picture, the embedded bundle draws the one to start from.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from sdxl_trt import Pipeline, Request, open_bundle

PROMPT = "a large yellow star on a green background"


def change(pipeline: Pipeline, source: Path | None, prompt: str, path: Path, strength: float = 0.7) -> None:
    """Change `source` towards `prompt`; with `strength` 1 nothing of it is left."""
    if source is None:
        first = next(iter(pipeline.generate(Request("a large red star on a blue background", seed=7))))
        pixels = np.asarray(first.image)
    else:
        pixels = np.asarray(Image.open(source).convert("RGB"))
    for picture in pipeline.generate(Request(prompt, image=pixels, strength=strength, seed=7)):
        picture.save(path)


if __name__ == "__main__":
    arguments = dict(enumerate(sys.argv))
    start = Path(arguments[1]) if 1 in arguments else None
    with open_bundle() as opened:
        change(opened, start, arguments.get(2, PROMPT), Path(arguments.get(3, "image_to_image.png")))
