"""trt-bench's contestants in the peers' environment have the same outputs as ours, on the same inputs."""

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
     ("openvino", {"base UNet step", "refiner UNet step"})],
)  # fmt: skip
def test_a_peer_computes_the_same(spec: Spec, name: str, tasks: set[str], measured: Callable[[str], None]) -> None:
    theirs = _outputs(spec, name)
    assert set(theirs) == tasks
    ours = _outputs(spec, "sdxl-trt", tuple(theirs))
    for task, output in theirs.items():
        assert output.shape == ours[task].shape
        difference = np.abs(output.astype(np.float64) - ours[task]).max()
        measured(f"{name}: {task:<24} largest difference {difference:.1e}")
        assert difference <= (LEVELS if task == "picture" else TOLERANCE), task
        assert np.ptp(output) > 100 * TOLERANCE
