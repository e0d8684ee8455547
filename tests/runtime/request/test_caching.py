"""A step cache as it is asked for: which stage it concerns, what is refused, and what is said where it does nothing."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_trt.engines import IncompatibleError, UsageError
from sdxl_trt.engines.bundle import Bundle, Manifest
from sdxl_trt.runtime import Request
from sdxl_trt.runtime.diffusion import CachePolicy
from sdxl_trt.runtime.request import ResolvedRequest, resolve_request

FOX = Request("a fox", steps=20, seed=1)


def _resolved(embedded: Bundle, **changes: Any) -> ResolvedRequest:
    return resolve_request(replace(FOX, **changes), embedded.manifest)


@pytest.mark.parametrize(
    ("changes", "base", "refiner"),
    [
        ({}, None, None),
        ({"cache": 1, "refiner_cache": 1}, None, None),
        ({"cache": 2}, CachePolicy(2, 4), CachePolicy(2, 2)),
        ({"cache": 3, "refiner_cache": 2}, CachePolicy(3, 4), CachePolicy(2, 2)),
        ({"cache": 2, "refiner_cache": 1}, CachePolicy(2, 4), None),
        ({"refiner_cache": 2}, None, CachePolicy(2, 2)),
        ({"cache": 2, "handoff": None}, CachePolicy(2, 4), None),
        ({"cache": 2, "refiner_sampler": "euler_ancestral"}, CachePolicy(2, 4), CachePolicy(2, 2, reach=0.0)),
        ({"cache": 2, "sampler": "dpmpp_2m", "handoff": None}, CachePolicy(2, 4, reach=0.5), None),
        ({"cache": 2, "sampler": "dpm_2", "handoff": None}, CachePolicy(2, 4, reach=0.0), None),
        ({"cache": 4, "handoff_step": 18}, CachePolicy(4, 4), None),  # the refiner's two steps are full
    ],
)
def test_base_and_refiner_have_intervals_of_their_own(
    embedded: Bundle, changes: dict[str, Any], base: CachePolicy | None, refiner: CachePolicy | None
) -> None:
    resolved = _resolved(embedded, **changes)
    assert (resolved.cache_of("base"), resolved.cache_of("refiner")) == (base, refiner)
    assert resolved.caches == bool(base or refiner)
    assert resolved.notes == ()


@given(st.integers(1, 40), st.integers(1, 40))
def test_a_stage_is_cached_if_a_step_of_it_is_not_full(embedded: Bundle, steps: int, every: int) -> None:
    if every > steps:
        with pytest.raises(UsageError, match=f"^--cache {every}: there are {steps} steps; choose "):
            _resolved(embedded, steps=steps, cache=every, handoff=None)
        return
    resolved = _resolved(embedded, steps=steps, cache=every, handoff=None)
    assert resolved.caches == (every > 1 and steps > 4)
    assert bool(resolved.notes) == (every > 1 and steps <= 4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cache": 0}, "--cache 0: choose 1 or more"),
        ({"refiner_cache": -1}, "--refiner-cache -1: choose 1 or more"),
        ({"cache": 21}, "--cache 21: there are 20 steps; choose 2 or 3 to save time, or 1 for no cache"),
        ({"refiner_cache": 21}, "--refiner-cache 21: there are 20 steps; choose 2 or 3 to save time, or 1 for no"),
    ],
)
def test_an_interval_that_cannot_be_is_one_line(embedded: Bundle, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        _resolved(embedded, **changes)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 3, "cache": 2}, "--cache has no effect: the base takes 2 steps, and the first 4 are full"),
        ({"refiner_cache": 2, "handoff": None}, "--refiner-cache has no effect: the refiner takes no step"),
        ({"refiner_cache": 2, "handoff_step": 18},
         "--refiner-cache has no effect: the refiner takes 2 steps, and the first 2 are full"),
    ],
)  # fmt: skip
def test_a_cache_without_effect_is_said(embedded: Bundle, changes: dict[str, Any], says: str) -> None:
    assert _resolved(embedded, **changes).notes == (says,)


def _without(manifest: Manifest, *stages: str) -> Manifest:
    changed = {name: msgspec.structs.replace(manifest.stages()[name], shallow=None) for name in stages}  # type: ignore[index]
    return msgspec.structs.replace(manifest, **changed)


def test_a_bundle_without_shallow_unets_is_refused_where_they_are_needed(embedded: Bundle) -> None:
    older, half = _without(embedded.manifest, "base", "refiner"), _without(embedded.manifest, "refiner")
    with pytest.raises(
        IncompatibleError,
        match=r"^--cache 2: the bundle was exported without shallow UNets \(unet, refiner_unet",
    ):
        resolve_request(replace(FOX, cache=2), older)
    with pytest.raises(IncompatibleError, match=r"^--cache 2: the refiner's UNet .* --refiner-cache 1 leaves"):
        resolve_request(replace(FOX, cache=2), half)
    assert resolve_request(replace(FOX, cache=2, refiner_cache=1), half).caches
    assert resolve_request(replace(FOX, cache=2, handoff=None), half).caches
    assert not resolve_request(FOX, older).caches
