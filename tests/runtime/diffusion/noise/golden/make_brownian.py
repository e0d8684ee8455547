"""Write brownian.json: noise of torchsde's BrownianTree, as k-diffusion and ComfyUI draw it for a sampler's steps.

torchsde is not installed for the ordinary tests. Run it in the peers' environment:
.venv-peers/bin/python tests/runtime/diffusion/noise/golden/make_brownian.py
"""

import json
import warnings
from itertools import pairwise
from pathlib import Path

import torch
import torchsde

SHAPE = (2, 1, 3, 4)
SEEDS = [0, 7, 2**32 + 3, 2**64 - 1]
GRID = [14.614641, 9.1274, 5.0, 2.5, 1.0, 0.41, 0.1, 0.029168]
"""Sigmas of steps. Noise is drawn for the first half of each step, the step, and at the end the whole range."""


def ways() -> list[tuple[float, float]]:
    steps = list(pairwise(GRID))
    halves = [(sigma, (sigma * after) ** 0.5) for sigma, after in steps]
    return [way for both in zip(halves, steps, strict=True) for way in both] + [(GRID[0], GRID[-1])]


def noises(seed: int) -> list[list[float]]:
    low, high = (torch.tensor(value) for value in (GRID[-1], GRID[0]))
    tree = torchsde.BrownianTree(low, torch.zeros(SHAPE), high, entropy=seed)
    found = []
    for way in ways():
        sigma, after = (torch.tensor(value) for value in way)
        found.append((-tree(after, sigma) / (sigma - after).sqrt()).flatten().tolist())
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the ends are rounded to a millionth, and values beyond them are clipped
    golden = {
        "shape": SHAPE,
        "ends": [GRID[-1], GRID[0]],
        "ways": ways(),
        "noises": {str(seed): [[round(value, 7) for value in noise] for noise in noises(seed)] for seed in SEEDS},
    }
    Path(__file__).with_name("brownian.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")
