"""The stages from the pool's side: each phase's next engine, groups, tiles, and a single switch of UNets."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines.bundle.profile import Range, fixed
from sdxl_trt.engines.errors import SizeError
from sdxl_trt.engines.plans import sizes as profiles
from sdxl_trt.engines.plans.limits import PlanLimits
from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.pipeline import pipeline as pipeline_module
from sdxl_trt.runtime.pipeline.pipeline import Pipeline
from sdxl_trt.runtime.text.encoder import Prompt, PromptEncoder
from sdxl_trt.runtime.vae import tile_sizes

PROMPT = "a red fox in the snow"
SMALL = {"steps": 4, "width": 32, "height": 32, "seed": 5}


@pytest.fixture(scope="module")
def opened(pairs: Callable[[str], Any]) -> Iterator[Pipeline]:
    """One pipeline for all tests: engines stay loaded."""
    with open_bundle(pairs("outline").bundle, residency="resident") as pipeline:
        yield pipeline


class Watch:
    """Records a pool's phases, and the input shapes of its engines."""

    def __init__(self, pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.phases: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self._phase, self._monkeypatch = pool.phase, monkeypatch
        monkeypatch.setattr(pool, "phase", self.phase)

    def phase(self, *names: str, next_engines: tuple[str, ...] = ()) -> tuple[Any, ...]:
        self.phases.append((names, next_engines))
        engines = self._phase(*names, next_engines=next_engines)
        for name, engine in zip(names, engines, strict=True):
            self._watch(name, engine)
        return engines

    def _watch(self, name: str, engine: Any) -> None:
        if name in self.shapes:
            return
        shapes, infer = self.shapes.setdefault(name, []), engine.infer

        def watched(inputs: Any, *rest: Any) -> Any:
            shapes.append(next(iter(inputs.values())).shape)
            return infer(inputs, *rest)

        self._monkeypatch.setattr(engine, "infer", watched)


@pytest.fixture
def watch(opened: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(opened.pool, monkeypatch)


ENCODERS = [(("text_encoder",), ("text_encoder_2",)), (("text_encoder_2",), ("unet",))]


def test_each_phase_names_the_engine_that_the_next_one_needs(opened: Pipeline, watch: Watch) -> None:
    list(opened.generate(Request(PROMPT, handoff=0.5, **SMALL)))
    assert watch.phases == [
        *ENCODERS,
        (("unet",), ("refiner_unet",)),
        (("refiner_unet",), ("vae_decoder",)),
        (("vae_decoder",), ()),
    ]


def test_the_base_alone_is_followed_by_the_decoder(opened: Pipeline, watch: Watch) -> None:
    list(opened.generate(Request(PROMPT, handoff=None, **SMALL)))
    assert watch.phases == [*ENCODERS, (("unet",), ("vae_decoder",)), (("vae_decoder",), ())]


@pytest.mark.parametrize(("guidance", "rows"), [(5.0, [4, 4, 2]), (1.0, [2, 2, 1])])
def test_groups_do_not_exceed_the_plans_batch(
    opened: Pipeline, monkeypatch: pytest.MonkeyPatch, guidance: float, rows: list[int]
) -> None:
    limits = PlanLimits(height=fixed(32), width=fixed(32), pictures=2, tokens=fixed(77))
    monkeypatch.setattr(opened.pool, "limits", limits)
    pipeline = Pipeline(opened.pool)
    watch = Watch(opened.pool, monkeypatch)
    request = Request(PROMPT, handoff=0.5, count=5, guidance=guidance, **SMALL)
    pictures = [step.pictures for step in pipeline.steps(request) if step.stage == "base"]
    assert [(group.start, group.stop) for group in pictures] == [(0, 2)] * 2 + [(2, 4)] * 2 + [(4, 5)] * 2
    for unet in ("unet", "refiner_unet"):
        assert [shape[0] for shape in watch.shapes[unet]] == [count for count in rows for _ in range(2)]


def test_a_size_outside_the_plans_is_refused_before_anything_is_loaded(
    opened: Pipeline, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = Range(min=64, opt=64, max=128)
    monkeypatch.setattr(opened.pool, "limits", PlanLimits(height=sides, width=sides, pictures=1, tokens=fixed(77)))
    with pytest.raises(SizeError, match="--width 32: the plans were built for 64 to 128; try 64"):
        opened.steps(Request(PROMPT, **SMALL))
    assert watch.phases == []


def _pixels(pipeline: Pipeline, **settings: Any) -> np.ndarray:
    request = Request(PROMPT, handoff=0.5, steps=4, seed=5, width=64, height=96, **settings)
    return np.stack([np.asarray(picture.image) for picture in pipeline.generate(request)]).astype(np.float64)


def test_a_decoder_with_small_profiles_gets_tiles(
    opened: Pipeline, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _pixels(opened, count=2)
    assert watch.shapes["vae_decoder"] == [(1, 4, 48, 32)] * 2
    monkeypatch.setattr(pipeline_module, "decoder_sizes", lambda *_: [((8, 8), (24, 24))])
    tiled = _pixels(opened, count=2)
    assert watch.shapes["vae_decoder"][2:] == [(1, 4, 24, 24)] * 2 * (3 * 2)
    assert 0 < np.mean((tiled - whole) ** 2) < 255**2 / 10 ** (30 / 10), "30 dB"


def test_plans_of_a_wide_decoder_decode_in_tiles(
    opened: Pipeline, simulated: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """fp32 plans are built so: the decoder's for tiles, whatever sizes the UNets' take."""
    from simulated.bundles import make_simulated_bundle

    monkeypatch.setattr(profiles, "TILE", 48)
    sides = {"height": (32, 64, 96), "width": (32, 64, 96), "batch": (1, 2, 2)}
    bundle = make_simulated_bundle(simulated, opened.pool.bundle.root, tmp_path / "bundle", **sides)
    whole = _pixels(opened, count=3)
    finals = opened.run.final
    with open_bundle(bundle, provider="tensorrt") as pipeline:
        tiled = _pixels(pipeline, count=3)
        np.testing.assert_allclose(pipeline.run.final, finals, rtol=0, atol=1e-3)
        assert pipeline.pool.swaps <= 1
    assert simulated.executed.count("vae_decoder") == 3 * (3 * 2)
    assert 0 < np.mean((tiled - whole) ** 2) < 255**2 / 10 ** (30 / 10), "30 dB"


def test_tiles_can_be_requested(opened: Pipeline, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_sizes, "TILE", 32)
    _pixels(opened, tile=True)
    assert set(watch.shapes["vae_decoder"]) == {(1, 4, 16, 16)}


def test_no_more_prompts_share_a_call_than_an_encoder_takes(opened: Pipeline, watch: Watch) -> None:
    encoder, stage = PromptEncoder(opened.pool), opened.manifest.base
    prompts = [Prompt(f"a fox {i}", f"the snow {i}") for i in range(10)]
    together = encoder.encode([(stage, prompt) for prompt in prompts], "unet")
    assert {name: [shape[0] for shape in shapes] for name, shapes in watch.shapes.items()} == {
        "text_encoder": [8, 2],
        "text_encoder_2": [8, 2],
    }
    for prompt, embeds in zip(prompts, together, strict=True):
        (alone,) = encoder.encode([(stage, prompt)], "unet")
        np.testing.assert_allclose(embeds.hidden, alone.hidden, rtol=0, atol=1e-5)
        np.testing.assert_allclose(embeds.pooled, alone.pooled, rtol=0, atol=1e-5)


def test_an_abandoned_run_leaves_nothing_loaded(pairs: Callable[[str], Any]) -> None:
    """The caller stops during the base's steps, while the refiner is prefetched: both are unloaded."""
    with open_bundle(pairs("outline").bundle, residency="swap") as pipeline:
        steps = pipeline.steps(Request(PROMPT, handoff=0.5, **SMALL))
        assert next(step for step in steps if step.stage == "base").index == 1
        engines = dict(pipeline.pool._engines)
    assert list(engines) == ["unet"]
    assert pipeline.pool._engines == {}
