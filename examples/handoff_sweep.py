"""When should the refiner take over? One picture for each handoff: ``python examples/handoff_sweep.py sheet.png``.

The requests differ in the handoff only, so the base runs once for all of them and each leaves it at its own step.
"""

import sys
from dataclasses import replace
from pathlib import Path

from sdxl_trt import Picture, Request, open_bundle
from sdxl_trt.runtime import Batch, contact_sheet

HANDOFFS = (0.25, 0.5, 0.6, 0.7, 0.8, None)


def sweep(prompt: str, path: Path) -> None:
    """Draw `prompt` once for each handoff with one seed, and save the sheet at `path`; None is the base alone."""
    requests = [replace(Request(prompt, seed=7), handoff=handoff) for handoff in HANDOFFS]
    with open_bundle() as pipeline:
        steps = Batch(pipeline, requests).steps()
        pictures: dict[int, Picture] = {number: step.picture for number, step in steps if step.picture is not None}
    titles = ["base alone" if handoff is None else f"handoff {handoff}" for handoff in HANDOFFS]
    contact_sheet([pictures[number].image for number in sorted(pictures)], titles, columns=3, cell=256).save(path)


if __name__ == "__main__":
    sweep("a striped yellow circle on a green background", Path(sys.argv[1] if len(sys.argv) > 1 else "sweep.png"))
