"""Contestants with a preset draw what trt-generate draws with it, with steps scaled to the run's."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_trt.benchmarks.contest.bench import BenchOptions, settled_spec
from sdxl_trt.benchmarks.contest.inputs import draw_inputs, write_inputs
from sdxl_trt.benchmarks.contestants.__main__ import make
from sdxl_trt.benchmarks.contestants.ours import preset_settings
from sdxl_trt.benchmarks.contestants.protocol import TASKS, Ask, Spec
from sdxl_trt.benchmarks.measure import find_subject
from sdxl_trt.mini import bundle_path
from sdxl_trt.runtime import PRESETS, Request, open_bundle


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    folder = tmp_path_factory.mktemp("presets")
    subject = find_subject(bundle_path(), None, None, folder, lambda _: None)
    options = BenchOptions(steps=12, width=64, height=64)
    found = settled_spec(subject, options, inputs=folder / "inputs.npz")
    drawn = draw_inputs(subject.bundle, width=64, height=64, batch=1, guidance=found.guidance, seed=found.seed,
                        prompt=found.prompt)  # fmt: skip
    write_inputs(Path(found.inputs), drawn)
    return found


@pytest.mark.parametrize(
    ("name", "stated"),
    [("sdxl-trt-fast", {"steps": 8, "cache": 2}), ("sdxl-trt-fastest", {"steps": 6, "cache": 2})],
)
def test_a_presets_contestant_draws_that_presets_picture(spec: Spec, name: str, stated: dict[str, int]) -> None:
    contestant = make(msgspec.structs.replace(spec, name=name))
    ready = contestant.ready()
    assert ready.tasks == ("picture",)
    assert set(ready.not_run) == set(TASKS) - {"picture"}
    option = name.removeprefix("sdxl-trt-")
    assert ready.note == f"--{option}, for 12 steps: steps {stated['steps']}, cache {stated['cache']}"
    done = contestant.task(Ask(do="run", task="picture"))()
    with open_bundle() as pipeline:
        request = Request(spec.prompt, handoff=0.8, guidance=spec.guidance, width=64, height=64, seed=spec.seed,
                          latents=np.load(spec.inputs)["latents"], aesthetic_score=spec.aesthetic_score,
                          negative_aesthetic_score=spec.negative_aesthetic_score, **stated)  # fmt: skip
        (wanted,) = pipeline.generate(request)
        np.testing.assert_array_equal(done.output[0], np.asarray(wanted.image))


@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 120))
def test_a_presets_steps_scale_with_the_runs(preset: str, steps: int) -> None:
    found, stated = preset_settings(preset, steps), PRESETS[preset]
    assert found.keys() == stated.keys()
    assert abs(found["steps"] - stated["steps"] * steps / 30) <= 0.5 or found["steps"] == 1
    assert 1 <= found["cache"] <= found["steps"]
    assert found["cache"] == min(stated["cache"], found["steps"])


def test_of_thirty_steps_a_preset_is_what_it_says() -> None:
    assert {name: preset_settings(name, 30) for name in PRESETS} == {name: dict(PRESETS[name]) for name in PRESETS}
    assert Request("").steps == 30
