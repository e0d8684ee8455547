"""A picture from a prompt: ``python examples/text_to_image.py "a large red star on a blue background" star.png``."""

import sys
from pathlib import Path

from sdxl_trt import Request, open_bundle

PROMPT = "a large red star on a blue background"


def draw(prompt: str, path: Path, bundle: Path | None = None) -> None:
    """Draw `prompt` with the bundle at `bundle`, or the embedded one if None, and save it at `path`."""
    request = Request(prompt, steps=30, handoff=0.8, seed=7)
    with open_bundle(bundle) as pipeline:
        for step in pipeline.steps(request):
            if step.picture is not None:
                step.picture.save(path)
            sys.stderr.write(f"\r{step.stage} {step.index}/{step.total} ")
    sys.stderr.write("\n")


if __name__ == "__main__":
    draw(sys.argv[1] if len(sys.argv) > 1 else PROMPT, Path(sys.argv[2] if len(sys.argv) > 2 else "text_to_image.png"))
