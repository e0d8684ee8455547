"""One process that `lora_switch` measures: load a UNet, alone or with a LoRA, or switch a LoRA on and off again.

``python -m sdxl_trt.benchmarks.lora_switch.child WHAT BUNDLE LORA --side S --steps N`` prints one line of JSON.
"""

__all__ = ["Found", "main"]

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from sdxl_trt.engines import Array, numpy_dtype
from sdxl_trt.engines.adapters import ScaledLora, open_lora
from sdxl_trt.engines.backends.ort import OrtEngine
from sdxl_trt.engines.bundle import read_bundle

SCALE = 0.8
UNET = "unet"


class Found(msgspec.Struct, frozen=True):
    """Seconds of opening the LoRA file, of each load, and of the steps after each; `equal` compares first and last."""

    opening: float
    loads: list[float]
    steps: list[list[float]]
    moved: float
    equal: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_trt.benchmarks.lora_switch.child", description=__doc__)
    parser.add_argument("what", choices=("plain", "lora", "switch"))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--side", type=int, default=64, help="of the latents")
    parser.add_argument("--steps", type=int, default=3, help="calls of the UNet after each load")
    given = parser.parse_args(argv)
    sys.stdout.write(msgspec.json.encode(_run(given.what, given.bundle, given.lora, given.side, given.steps)).decode())
    sys.stdout.write("\n")
    return 0


def _run(what: str, bundle: Path, file: Path, side: int, steps: int) -> Found:
    engine = OrtEngine(read_bundle(bundle), UNET)
    started = time.perf_counter()
    lora = ScaledLora(open_lora(file), SCALE)
    opening = time.perf_counter() - started
    engine.prefetch()  # the digest of the weights, which is checked once
    engine.unload()
    sets: dict[str, list[tuple[ScaledLora, ...]]] = {"plain": [()], "lora": [(lora,)], "switch": [(), (lora,), ()]}
    loads, laps, results = [], [], []
    for loras in sets[what]:
        started = time.perf_counter()
        engine.adapt(loras)
        engine.load()
        loads.append(time.perf_counter() - started)
        if what == "switch":
            inputs = _inputs(engine, side)
            results.append(engine.infer(inputs)["out_sample"])  # also the warm-up
            laps.append([_timed(engine, inputs) for _ in range(steps)])
    loads, laps = [round(load, 4) for load in loads], [[round(lap, 4) for lap in each] for each in laps]
    moved = float(np.abs(results[1].astype(np.float32) - results[0]).max()) if results else 0.0
    return Found(round(opening, 4), loads, laps, moved, not results or np.array_equal(results[0], results[-1]))


def _timed(engine: OrtEngine, inputs: dict[str, Array]) -> float:
    started = time.perf_counter()
    engine.infer(inputs)
    return time.perf_counter() - started


def _inputs(engine: OrtEngine, side: int) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    axes = {"rows": 1, "height": side, "width": side, "tokens": 77}
    return {
        spec.name: rng.standard_normal([axis if isinstance(axis, int) else axes[axis] for axis in spec.shape]).astype(
            numpy_dtype(spec)
        )
        for spec in engine.component.inputs
    }


if __name__ == "__main__":
    raise SystemExit(main())
