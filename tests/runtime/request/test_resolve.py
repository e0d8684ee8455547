"""Defaults are resolved once, and what cannot be honoured names what can."""

import math
import re
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.bundle.manifest import Manifest, Scheduler, Stage, Vae
from sdxl_trt.engines.errors import SizeError, UsageError
from sdxl_trt.runtime.request.request import MAX_SEED, Request
from sdxl_trt.runtime.request.resolve import resolve_request
from sdxl_trt.runtime.request.sizes import MAX_SIDE

FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def _stage(multiple: int) -> Stage:
    scheduler = Scheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    vae = Vae(decoder="v", encoder=None, scaling_factor=0.13025, latent_channels=4, factor=8)
    return Stage(
        unet="u", text_encoders=(), vae=vae, scheduler=scheduler, time_ids=(), sample_size=128, size_multiple=multiple,
        force_zeros_for_empty_prompt=True,
    )  # fmt: skip


@pytest.fixture
def manifest() -> Manifest:
    """Return SDXL's outline: sizes in multiples of 32, with the refiner of 64."""
    return Manifest(
        format="f", format_version=1, generator="g", precision="fp16", components={}, tokenizers={},
        base=_stage(32), refiner=_stage(64),
    )  # fmt: skip


@pytest.fixture
def alone(manifest: Manifest) -> Manifest:
    """Return a bundle without refiner."""
    return msgspec.structs.replace(manifest, refiner=None)


def test_the_defaults_are_the_documented_ones(manifest: Manifest) -> None:
    resolved = resolve_request(Request("a red fox", seed=0), manifest)
    assert (resolved.width, resolved.height, resolved.request.steps, resolved.cut) == (1024, 1024, 30, 23)
    assert (resolved.request.guidance, resolved.refiner_guidance, resolved.seeds) == (5.0, 5.0, (0,))
    for told in resolved.sides["base"] + resolved.sides["refiner"]:
        assert (told.micro.aesthetic_score, told.micro.negative_aesthetic_score) == (6.0, 2.5)
        assert (told.micro.original_size, told.micro.crop) == ((1024, 1024), (0, 0))
    assert (resolved.prompt.text, resolved.prompt.text_2, resolved.negative) == ("a red fox", "a red fox", None)
    assert resolved.uses_refiner


def test_without_a_refiner_the_base_takes_all_steps(manifest: Manifest, alone: Manifest) -> None:
    for resolved in (resolve_request(Request(), alone), resolve_request(Request(handoff=None), manifest)):
        assert (resolved.cut, resolved.uses_refiner) == (30, False)


@pytest.mark.parametrize("settings", [{"handoff": 0.8}, {"handoff": 0.8, "steps": 1}, {"handoff_step": 5}])
def test_a_handoff_without_a_refiner_is_refused(alone: Manifest, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="the bundle has no refiner"):
        resolve_request(Request(**settings), alone)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf])
def test_a_fraction_outside_the_range_is_refused(manifest: Manifest, fraction: float) -> None:
    with pytest.raises(UsageError, match="choose a fraction between 0 and 1"):
        resolve_request(Request(handoff=fraction), manifest)


@pytest.mark.parametrize(("fraction", "idle"), [(0.999, "refiner"), (0.001, "base")])
def test_a_handoff_that_leaves_an_expert_idle_says_which(manifest: Manifest, fraction: float, idle: str) -> None:
    with pytest.raises(UsageError, match=f"leaves the {idle} no step of 30"):
        resolve_request(Request(handoff=fraction), manifest)


def test_the_usual_handoff_gives_way_where_steps_are_few(manifest: Manifest) -> None:
    assert [resolve_request(Request(steps=steps), manifest).cut for steps in (1, 2, 5)] == [1, 1, 4]


def test_a_handoff_in_steps_is_taken_as_it_is(manifest: Manifest) -> None:
    assert [resolve_request(Request(handoff_step=step), manifest).cut for step in (1, 23, 29)] == [1, 23, 29]
    for step in (0, 30, -1):
        with pytest.raises(UsageError, match="choose 1 to 29 of 30 steps"):
            resolve_request(Request(handoff_step=step), manifest)
    with pytest.raises(UsageError, match="state the same thing"):
        resolve_request(Request(handoff=0.5, handoff_step=3), manifest)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_have_a_range(manifest: Manifest, steps: int) -> None:
    with pytest.raises(UsageError, match="choose 1 to 1000"):
        resolve_request(Request(steps=steps), manifest)


@pytest.mark.parametrize("option", ["guidance", "refiner_guidance", "aesthetic_score", "negative_aesthetic_score"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(manifest: Manifest, option: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} .*finite"):
        resolve_request(Request(**{option: value}), manifest)


def test_zero_counts(manifest: Manifest) -> None:
    """Guidance, score and seed of 0 are values, not absences."""
    resolved = resolve_request(Request(refiner_guidance=0.0, aesthetic_score=0.0, seed=0), manifest)
    score = resolved.sides["refiner"][0].micro.aesthetic_score
    assert (resolved.refiner_guidance, score, resolved.seeds) == (0.0, 0.0, (0,))


def test_an_unknown_sampler_lists_the_known_ones(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match="--sampler 'magic' is unknown; choose one of: euler"):
        resolve_request(Request(sampler="magic"), manifest)


def _recording(manifest: Manifest, sampler: str) -> Manifest:
    """Return a manifest whose base was made from a scheduler class that means `sampler`."""
    scheduler = msgspec.structs.replace(manifest.base.scheduler, sampler=sampler)
    return msgspec.structs.replace(manifest, base=msgspec.structs.replace(manifest.base, scheduler=scheduler))


def test_the_bundle_says_which_sampler_its_author_chose(manifest: Manifest) -> None:
    assert resolve_request(Request(), manifest).request.sampler == "euler", "bundles of before say nothing"
    bundle = _recording(manifest, "dpmpp_2m")
    resolved = resolve_request(Request(), bundle)
    assert (resolved.request.sampler, resolved.refiner_sampler) == ("dpmpp_2m", "dpmpp_2m")
    asked = resolve_request(Request(sampler="dpmpp_2m"), manifest)
    np.testing.assert_array_equal(resolved.schedule.sigmas, asked.schedule.sigmas)
    assert resolve_request(Request(sampler="heun"), bundle).request.sampler == "heun"
    assert resolve_request(Request(compat="comfyui"), bundle).request.sampler == "euler", (
        "ComfyUI knows no folder's scheduler"
    )
    with pytest.raises(UsageError, match="--sampler 'tomorrows' is unknown"):
        resolve_request(Request(), _recording(manifest, "tomorrows"))


def test_each_picture_has_the_next_seed(manifest: Manifest) -> None:
    assert resolve_request(Request(seed=7, count=3), manifest).seeds == (7, 8, 9)
    assert resolve_request(Request(seed=MAX_SEED, count=2), manifest).seeds == (MAX_SEED, 0)
    drawn = {resolve_request(Request(), manifest).seeds for _ in range(8)}
    assert len(drawn) > 1
    for seed in (-1, MAX_SEED + 1):
        with pytest.raises(UsageError, match="--seed"):
            resolve_request(Request(seed=seed), manifest)


@pytest.mark.parametrize("count", [0, -1])
def test_no_picture_is_refused(manifest: Manifest, count: int) -> None:
    with pytest.raises(UsageError, match=f"-n {count}: choose 1 to 10000"):
        resolve_request(Request(count=count), manifest)


def test_an_absent_negative_is_not_an_empty_one(manifest: Manifest) -> None:
    assert resolve_request(Request(negative=None), manifest).negative is None
    empty = resolve_request(Request(negative=""), manifest).negative
    assert (empty.text, empty.text_2) == ("", "")
    both = resolve_request(Request(negative="blurry", negative_2="dark", prompt="p", prompt_2="q"), manifest)
    assert (both.negative.text, both.negative.text_2, both.prompt.text_2) == ("blurry", "dark", "q")
    with pytest.raises(UsageError, match="--negative-2 without --negative"):
        resolve_request(Request(negative_2="dark"), manifest)


def test_multiples_follow_the_unets_in_use(manifest: Manifest, alone: Manifest) -> None:
    assert resolve_request(Request(width=96, height=1056), alone).width == 96
    assert resolve_request(Request(width=96, handoff=None), manifest).width == 96
    with pytest.raises(SizeError, match=r"--width 96: .* multiples of 64; try 64 or 128"):
        resolve_request(Request(width=96), manifest)


@settings(deadline=None, suppress_health_check=FIXTURES, max_examples=300)
@given(
    side=st.integers(-100, MAX_SIDE + 200) | st.integers(MAX_SIDE + 1, 10**12),
    option=st.sampled_from(["width", "height"]),
)
def test_every_size_is_taken_or_its_remedies_are(manifest: Manifest, side: int, option: str) -> None:
    try:
        assert getattr(resolve_request(Request(**{option: side}), manifest), option) == side
    except SizeError as exc:
        tries = re.findall(r"\d+", str(exc).split("try ")[1])
        assert tries
        for proposed in tries:
            assert getattr(resolve_request(Request(**{option: int(proposed)}), manifest), option) == int(proposed)


def test_sizes_condition_the_model_height_first(manifest: Manifest) -> None:
    micro = resolve_request(Request(width=768, height=512), manifest).sides["base"][0].micro
    assert (micro.original_size, micro.target_size) == ((512, 768), (512, 768))


def _latents(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def test_latents_bring_their_size_and_count(manifest: Manifest) -> None:
    resolved = resolve_request(Request(latents=_latents(2, 4, 64, 96), seed=3), manifest)
    assert (resolved.width, resolved.height, resolved.seeds) == (768, 512, (3, 4))


@pytest.mark.parametrize(
    ("latents", "words"),
    [
        (_latents(1, 3, 64, 64), r"shape \[1, 3, 64, 64\] given, \[1, 4, 64, 64\] expected"),
        (_latents(4, 64, 64), r"shape \[4, 64, 64\] given"),
        (_latents(), r"shape \[\] given"),
        (_latents(0, 4, 64, 64), r"shape \[0, 4, 64, 64\] given"),
        (_latents(1, 4, 64, 64, dtype=np.float64), "finite float32"),
        (np.full((1, 4, 64, 64), np.nan, np.float32), "finite float32"),
        (_latents(1, 4, 0, 0), "multiples of 64"),
        (_latents(1, 4, 12, 8), "--height 96: .* try 64 or 128"),
    ],
)
def test_latents_that_do_not_fit_are_refused(manifest: Manifest, latents: np.ndarray, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        resolve_request(Request(latents=latents), manifest)


@pytest.mark.parametrize("setting", [{"count": 2}, {"width": 1024}])
def test_latents_must_agree_with_what_is_stated(manifest: Manifest, setting: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="--latents: shape"):
        resolve_request(Request(latents=_latents(1, 4, 64, 64), **setting), manifest)


def test_comfyui_s_way_is_resolved_once(manifest: Manifest) -> None:
    resolved = resolve_request(
        Request("p", compat="comfyui", seed=7, count=2, sampler="uni_pc_bh2", guidance=0.5), manifest
    )
    assert (resolved.seeds, resolved.refiner_seeds) == ((7, 7), None)
    assert resolved.schedule.logs is not None
    assert resolved.schedule.timesteps[0] == 999, "the full range, as `normal` has it"
    assert resolved.guidance_of("base").wanted
    for positive, negative in resolved.sides.values():
        assert (positive.prompt.text, negative.prompt.text) == ("p", "")
        assert not negative.zeroed
    assert resolve_request(Request(compat="comfyui", schedule="karras"), manifest).request.schedule == "karras"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"compat": "a1111"}, "--compat 'a1111' is unknown; choose one of: diffusers, comfyui"),
        ({"compat": "comfyui", "schedule": "trailing"}, "--schedule 'trailing' is unknown; choose one of: simple"),
        ({"sampler": "uni_pc_bh2"}, "--sampler 'uni_pc_bh2' is unknown"),
        ({"refiner_seed": -1}, "--seed -1"),
        ({"clip_skip": 1}, "--clip-skip 1: choose 0 to 0"),
        ({"clip_skip": -1}, "--clip-skip -1"),
        ({"original_size": (-1, 5)}, "--original-size -1: choose 0 to"),
        ({"crop": (0, 10**400)}, "--crop 10"),
        ({"target_size": (2**21, 5)}, "--target-size"),
    ],
)
def test_what_comfyui_s_way_cannot_have_is_refused(manifest: Manifest, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        resolve_request(Request(**settings), manifest)


def test_sizes_that_are_stated_condition_both_stages_and_sides(manifest: Manifest) -> None:
    request = Request(original_size=(2048, 4096), crop=(1, 2), target_size=(512, 256))
    for side in (side for pair in resolve_request(request, manifest).sides.values() for side in pair):
        micro = side.micro
        assert (micro.original_size, micro.crop, micro.target_size) == ((2048, 4096), (1, 2), (512, 256))


@pytest.mark.parametrize(
    ("schedule", "steps", "told"),
    [("leading", 14, False), ("trailing", 20, False), ("trailing", 14, True), ("linspace", 10, True)],
)
def test_ddim_says_where_diffusers_steps_otherwise(
    manifest: Manifest, caplog: Any, schedule: str, steps: int, told: bool
) -> None:
    resolve_request(Request("x", sampler="ddim", schedule=schedule, steps=steps), manifest)
    assert ("diffusers' DDIMScheduler goes" in caplog.text) == told
    caplog.clear()
    resolve_request(Request("x", schedule=schedule, steps=steps), manifest)
    assert "DDIMScheduler" not in caplog.text
