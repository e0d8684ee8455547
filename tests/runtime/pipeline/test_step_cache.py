"""A step cache in runs of the embedded pair: which engine answers each call, what is loaded, recorded and repeated."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sdxl_trt.engines.backends.ort.engine import OrtEngine
from sdxl_trt.engines.bundle import read_bundle, write_manifest
from sdxl_trt.mini.embedded import bundle_path
from sdxl_trt.runtime import Pipeline, Request, open_bundle
from sdxl_trt.runtime.cli.generate import main as trt_generate
from sdxl_trt.runtime.pipeline import read_settings

STAR = Request("a large red star", steps=10, handoff_step=7, width=64, height=64, seed=3, sampler="euler")
CACHED = replace(STAR, cache=2)
FULL, SHALLOW = "full", "shallow"


@pytest.fixture(scope="module")
def opened() -> Iterator[Pipeline]:
    with open_bundle(residency="resident", provider="ort-cpu") as pipeline:
        yield pipeline


Calls = list[tuple[str, str, int, float]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Return a list of (stage, kind, rows, factor) of every call of a UNet, as it is made."""
    made: Calls = []

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(engine: OrtEngine, inputs: Any, *rest: Any) -> Any:
            if "unet" in engine.name:
                stage = "refiner" if engine.name.startswith("refiner") else "base"
                kind = SHALLOW if engine.name.endswith("shallow") else FULL
                factor = float(inputs["deep_factor"][0]) if kind == SHALLOW else 0.0
                made.append((stage, kind, len(inputs["sample"]), round(factor, 3)))
            return method(engine, inputs, *rest)

        return call

    for name in ("infer", "infer_keeping"):
        monkeypatch.setattr(OrtEngine, name, watched(getattr(OrtEngine, name)))
    return made


def _final(pipeline: Pipeline, request: Request) -> np.ndarray:
    list(pipeline.generate(request))
    assert pipeline.run is not None
    return pipeline.run.final


def _kinds(calls: Calls, stage: str) -> str:
    return "".join(kind[0] for name, kind, *_ in calls if name == stage)


@pytest.mark.parametrize(
    ("changes", "base", "refiner"),
    [
        ({}, "ffffsfs", "ffs"),
        ({"refiner_cache": 1}, "ffffsfs", "fff"),
        ({"cache": 3}, "ffffssf", "ffs"),
        ({"sampler": "heun"}, "ffffffffssffss", "ffffs"),  # two calls a step, one in the last
        ({"handoff_step": 4}, "ffff", "ffsfsf"),
        ({"guidance_interval": (0.0, 0.6)}, "ffffsff", "ffs"),  # the rows change in a step that is not full
    ],
)
def test_the_full_unet_runs_in_some_steps(
    opened: Pipeline, calls: Calls, changes: dict[str, Any], base: str, refiner: str
) -> None:
    list(opened.generate(replace(CACHED, **changes)))
    assert (_kinds(calls, "base"), _kinds(calls, "refiner")) == (base, refiner)


def test_the_factor_is_that_of_the_line_through_the_latest_sigmas(opened: Pipeline, calls: Calls) -> None:
    list(opened.generate(replace(CACHED, cache=3)))
    assert opened.run is not None
    sigmas = [float(sigma) for sigma in opened.run.request.schedule.sigmas]
    given = [factor for _, kind, _, factor in calls if kind == SHALLOW]
    line = [
        (sigmas[at] - sigmas[new]) / (sigmas[new] - sigmas[old]) for at, new, old in ((4, 3, 2), (5, 3, 2), (9, 8, 7))
    ]
    assert given == [pytest.approx(each, abs=1e-3) for each in line]


def test_an_interval_of_one_is_no_cache(opened: Pipeline, calls: Calls) -> None:
    plain = _final(opened, STAR)
    np.testing.assert_array_equal(_final(opened, replace(STAR, cache=1, refiner_cache=1)), plain)
    assert {kind for _, kind, *_ in calls} == {FULL}
    cached = _final(opened, CACHED)
    assert 1e-3 < np.abs(cached - plain).max() < 1.0
    with open_bundle(provider="ort-cpu") as pipeline:
        list(pipeline.generate(STAR))
        assert not [name for name in pipeline.pool.loads if "shallow" in name]


@pytest.mark.parametrize("at_once", [1, 2])
def test_every_group_has_features_of_its_own(opened: Pipeline, at_once: int) -> None:
    together = _final(Pipeline(opened.pool, pictures_at_once=at_once), replace(CACHED, count=3))
    for number in range(3):
        alone = _final(opened, replace(CACHED, seed=3 + number))[0]
        # Another number of rows may run other kernels.
        np.testing.assert_allclose(together[number], alone, rtol=0, atol=0.0 if at_once == 1 else 0.05)


def test_a_run_that_is_left_leaves_nothing_behind(opened: Pipeline) -> None:
    expected = _final(opened, CACHED)
    for step in opened.steps(replace(CACHED, seed=9)):
        if (step.stage, step.index) == ("base", 4):
            break
    np.testing.assert_array_equal(_final(opened, CACHED), expected)


def test_the_record_says_how_many_steps_were_full_and_repeats_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--steps", "10", "--handoff-step", "7", "--width", "64", "--height", "64", "--provider", "ort-cpu"]
    cached = ["--cache", "2", "--refiner-cache", "3", "--seed", "3"]
    assert trt_generate(["a star", *small, *cached, "-o", "first.png"]) == 0
    assert "; cache 2, of the refiner 3: 7 of 10 steps full; " in capsys.readouterr().err
    told = read_settings(tmp_path / "first.png")
    assert (told.cache, told.refiner_cache, told.full_steps) == (2, 3, 7)
    assert trt_generate(["--from", "first.png", "--json", "-o", "again.png"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cache"] == {"every": {"base": 2, "refiner": 3}, "full_steps": 7, "steps": 10}
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "first.png").read_bytes()
    assert (
        trt_generate(["--from", "first.png", "--cache", "1", "--refiner-cache", "1", "--json", "-o", "plain.png"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["cache"] is None
    plain = read_settings(tmp_path / "plain.png")
    assert (plain.cache, plain.full_steps) == (1, None)


def test_a_pair_whose_refiner_has_no_shallow_unet_caches_the_base_alone(
    opened: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half, alone = _without_the_refiner_s(tmp_path / "half"), replace(CACHED, refiner_cache=1)
    with open_bundle(half, provider="ort-cpu", plan_for=alone) as pipeline:
        np.testing.assert_array_equal(_final(pipeline, alone), _final(opened, alone))
        assert {"unet_shallow", "refiner_unet"} <= {*pipeline.pool.loads}
    asked = ["a star", "--engines", str(half), "--provider", "ort-cpu", "--cache", "2"]
    for arguments in (asked, [*asked, "--plan"]):
        assert trt_generate(arguments) == 3
        assert capsys.readouterr().err == (
            "error: the refiner's UNet (refiner_unet) was exported without a shallow one, which cached steps need;"
            " --refiner-cache 1 leaves the refiner out of the cache, or export the bundle again\n"
        )
    for option in (["--refiner-cache", "1"], ["--no-refiner"]):
        assert trt_generate([*asked, *option, "--plan"]) == 0
        assert "unet_shallow" in capsys.readouterr().out


def _without_the_refiner_s(root: Path) -> Path:
    """Write the embedded pair to `root` as `export-engines --components unet` leaves an older export."""
    shutil.copytree(bundle_path(), root, ignore=shutil.ignore_patterns("refiner_unet_shallow", "plans"))
    manifest = read_bundle(bundle_path()).manifest
    assert manifest.refiner is not None
    refiner = msgspec.structs.replace(manifest.refiner, shallow=None)
    parts = {name: part for name, part in manifest.components.items() if name != "refiner_unet_shallow"}
    write_manifest(root, msgspec.structs.replace(manifest, refiner=refiner, components=parts))
    return root


def test_an_open_bundle_loads_shallow_unets_once_for_all_requests(opened: Pipeline) -> None:
    for request in (STAR, CACHED, STAR, CACHED):
        list(opened.generate(request))
    loads = list(opened.pool.loads)
    assert {name: loads.count(name) for name in ("unet", "unet_shallow", "refiner_unet_shallow")} == {
        "unet": 1, "unet_shallow": 1, "refiner_unet_shallow": 1,
    }  # fmt: skip
