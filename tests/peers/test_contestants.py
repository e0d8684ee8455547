"""trt-bench's contestants in the peers' environment have the same outputs as ours, on the same inputs."""

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from sdxl_trt.benchmarks.contest.bench import BenchOptions, settled_spec
from sdxl_trt.benchmarks.contest.inputs import draw_inputs, write_inputs
from sdxl_trt.benchmarks.contestants.__main__ import make
from sdxl_trt.benchmarks.contestants.protocol import Ask, Spec
from sdxl_trt.benchmarks.measure.subjects import find_subject

TOLERANCE = 1e-4
PART = r"([a-z]+(?: unet)?) (\d+) of (\d+)"
LEVELS = 2
"""Allowed difference of two pictures, of 255: fp32 results are rounded at the end."""


@pytest.fixture(scope="module")
def spec(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Spec:
    folder, pair = tmp_path_factory.mktemp("bench"), exports / "outline"
    subject = find_subject(pair / "bundle", str(pair / "base"), str(pair / "refiner"), folder, print)
    spec = settled_spec(subject, BenchOptions(steps=4, handoff=0.5), inputs=folder / "inputs.npz")
    drawn = draw_inputs(subject.bundle, width=spec.width, height=spec.height, batch=spec.batch,
                        guidance=spec.guidance, seed=spec.seed, prompt=spec.prompt)  # fmt: skip
    write_inputs(Path(spec.inputs), drawn)
    return spec


def _outputs(spec: Spec, name: str, tasks: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    contestant = make(msgspec.structs.replace(spec, name=name))
    ready = contestant.ready()
    return {task: contestant.task(Ask(do="run", task=task))().output for task in tasks or ready.tasks}


@pytest.mark.parametrize(
    ("name", "tasks"),
    [("optimum", {"picture", "base UNet step", "refiner UNet step"}),
     ("openvino", {"picture", "base UNet step", "refiner UNet step", "VAE decode"})],
)  # fmt: skip
def test_a_peer_computes_the_same(spec: Spec, name: str, tasks: set[str], measured: Callable[[str], None]) -> None:
    theirs = _outputs(spec, name)
    assert set(theirs) == tasks
    ours = _outputs(spec, "sdxl-trt", tuple(theirs))
    for task, output in theirs.items():
        assert output.shape == ours[task].shape
        difference = np.abs(output.astype(np.float64) - ours[task]).max()
        measured(f"{name}: {task:<20} largest difference {difference:.1e}")
        assert difference <= (LEVELS if task == "picture" else TOLERANCE), task
        assert np.ptp(output) > 100 * TOLERANCE


BITS = {"openvino-bf16": 25.0, "openvino-int8": 12.0, "openvino-int8-scoped": 15.0, "openvino-int8-bf16": 15.0}
"""PSNR in dB, of the range of values, that a UNet step of random weights has at least in few bits."""


@pytest.mark.parametrize("name", BITS)
def test_openvino_in_few_bits_computes_nearly_the_same(spec: Spec, name: str, measured: Callable[[str], None]) -> None:
    exact = _outputs(spec, "openvino", ("picture", "base UNet step", "refiner UNet step"))
    contestant = make(msgspec.structs.replace(spec, name=name))
    ready = contestant.ready()
    assert ready.precision == ("bf16" if name.endswith("-bf16") and "int8" not in name else "int8")
    counts = {part: (int(narrow), int(every)) for part, narrow, every in re.findall(PART, ready.note)}
    if ready.precision == "int8":
        assert set(counts) == {"base unet", "refiner unet", "decoder"}
        for part, (narrow, every) in counts.items():
            # Conv_in and conv_out stay in every part of the narrower scope.
            assert every // 2 < narrow <= every - (0 if name == "openvino-int8" else 2), part
    else:
        assert ready.note == ""
    for task, wanted in exact.items():
        given = contestant.task(Ask(do="run", task=task))().output.astype(np.float64)
        error = np.mean((given - wanted) ** 2)
        psnr = 10 * np.log10(np.ptp(wanted.astype(np.float64)) ** 2 / error)
        measured(f"{name}: {task:<20} {psnr:.1f} dB of OpenVINO's fp32; {ready.note}")
        assert BITS[name] <= psnr < 90, task


def test_a_conversion_is_made_once(spec: Spec) -> None:
    folder = Path(spec.cache) / "openvino"
    _outputs(spec, "openvino", ("base UNet step",))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.xml")}
    assert any("base unet" in path.name for path in before)
    _outputs(spec, "openvino", ("base UNet step",))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.xml")} == before
