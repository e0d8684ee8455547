"""Cold start, from command to picture: trt-generate against a diffusers script that draws the same picture.

Both run as whole processes with the same weights, prompt, seed, size, steps and handoff, in turns.
"""

__all__ = ["OURS", "THEIRS", "cold_starts", "commands", "likeness"]

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sdxl_trt.benchmarks.contestants import Spec
from sdxl_trt.benchmarks.measure import Measured, Say, Subject, measure
from sdxl_trt.benchmarks.report import ColdStart

OURS, THEIRS = "trt-generate", "diffusers script"
LEAST_LIKENESS = 30.0
"""PSNR in dB below which two pictures count as different: the bundle may be fp16, the script is fp32."""
Measure = Callable[[list[str]], Measured]


def _installed(command: list[str]) -> Measured:
    """Measure a command whose modules are compiled, as an installed package's are; a checkout's on their first run."""
    return measure(command, {"PYTHONDONTWRITEBYTECODE": ""})


def commands(subject: Subject, spec: Spec, out: Path) -> dict[str, list[str]]:
    """Return both commands, each writing its picture into `out`; only ours if there is no checkpoint."""
    common = [spec.prompt, "--steps", str(spec.steps), "--seed", str(spec.seed), "--guidance", str(spec.guidance)]
    common += ["--width", str(spec.width), "--height", str(spec.height)]
    handoff = ["--handoff", "none" if spec.handoff is None else str(spec.handoff)]
    ours = [
        sys.executable,
        "-m",
        "sdxl_trt.runtime.cli",
        *common,
        *handoff,
        "--engines",
        str(subject.bundle.root),
    ]
    found = {OURS: [*ours, "-o", str(out / "ours.png")]}
    if subject.base:
        refiner = ["--refiner", subject.refiner, *handoff] if subject.refiner and spec.handoff is not None else []
        theirs = [
            sys.executable,
            "-m",
            "sdxl_trt.benchmarks.contestants.diffusers_picture",
            *common,
            "--base",
            subject.base,
        ]
        found[THEIRS] = [*theirs, *refiner, "--out", str(out / "theirs.png")]
    return found


def cold_starts(
    subject: Subject, spec: Spec, runs: int, *, run: Measure = _installed, say: Say = lambda _: None
) -> tuple[tuple[ColdStart, ...], str]:
    """Run both commands `runs` times in turns; return their times and memory, and a sentence comparing the pictures.

    A command that fails has no times, but a reason. A first round, which reads the files from disk, is not counted.
    """
    with tempfile.TemporaryDirectory(prefix="sdxl-trt-bench-") as folder:
        chosen = commands(subject, spec, Path(folder))
        done: dict[str, list[Measured]] = {name: [] for name in chosen}
        failed: dict[str, str] = {}
        for number in range(runs + 1):
            say(f"cold start: round {number} of {runs}")
            names = list(chosen) if number % 2 else list(reversed(chosen))
            for name in (name for name in names if name not in failed):
                measured = run(chosen[name])
                if not measured.ok:
                    failed[name] = measured.output.rpartition("\n")[2] or f"exit code {measured.exit_code}"
                elif number:
                    done[name].append(measured)
        starts = tuple(_start(name, chosen[name], done[name], failed.get(name, "")) for name in chosen)
        both = len(chosen) == 2 and not failed
        return starts, likeness(Path(folder) / "ours.png", Path(folder) / "theirs.png") if both else ""


def likeness(ours: Path, theirs: Path) -> str:
    """Return a sentence on how similar two picture files are."""
    from PIL import Image  # noqa: PLC0415 - only here

    one, other = (np.asarray(Image.open(path)).astype(np.float64) for path in (ours, theirs))
    if one.shape != other.shape:
        return "cold start: the two pictures have different sizes: their times cannot be compared"
    error = float(np.mean((one - other) ** 2))
    psnr = float("inf") if error == 0 else 10 * float(np.log10(255.0**2 / error))
    same = "the same picture" if psnr >= LEAST_LIKENESS else "DIFFERENT pictures: their times cannot be compared"
    return f"cold start: both drew {same} (PSNR {psnr:.1f} dB)"


def _start(name: str, command: Sequence[str], done: Sequence[Measured], missing: str) -> ColdStart:
    shown = ("python", *(Path(part).name if Path(part).is_absolute() else part for part in command[1:]))
    return ColdStart(
        name=name,
        command=shown,
        seconds=() if missing else tuple(each.seconds for each in done),
        peak_rss=max((each.peak_rss for each in done), default=0),
        missing=missing,
    )
