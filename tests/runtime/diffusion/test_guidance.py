"""Guidance against diffusers' arithmetic, and the steps that it applies to."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.diffusion.guidance import Guidance, guided_span, guides

SIGMAS = np.append(np.geomspace(14.6, 0.03, 10), 0).astype(np.float32)


@pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("scale", [1.5, 5.0, 12.0])
def test_predictions_combine_as_in_diffusers(rng: np.random.Generator, scale: float, rescale: float) -> None:
    import torch
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

    positive, negative = rng.normal(size=(2, 3, 4, 8, 8)).astype(np.float32)
    text, uncond = torch.from_numpy(positive), torch.from_numpy(negative)
    expected = uncond + scale * (text - uncond)
    if rescale > 0:
        expected = rescale_noise_cfg(expected, text, guidance_rescale=rescale)
    found = Guidance(scale, rescale).combine(positive.copy(), negative.copy())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("factor", [-14.6, 0.5])
def test_a_factor_multiplies_the_guided_prediction(rng: np.random.Generator, factor: float, rescale: float) -> None:
    positive, negative = rng.normal(size=(2, 3, 4, 8, 8)).astype(np.float32)
    guidance = Guidance(5.0, rescale)
    plain = guidance.combine(positive.copy(), negative.copy())
    found = guidance.combine(positive, negative, factor)
    assert found is positive
    np.testing.assert_allclose(found, factor * plain, rtol=2e-5, atol=2e-5 * abs(factor))


def test_a_full_rescale_has_the_spread_of_the_positive_prediction(rng: np.random.Generator) -> None:
    positive, negative = rng.normal(size=(2, 3, 4, 8, 8)).astype(np.float32)
    spread = Guidance(9.0, 1.0).combine(positive.copy(), negative).std(axis=(1, 2, 3))
    np.testing.assert_allclose(spread, positive.std(axis=(1, 2, 3)), rtol=1e-5)


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_guided_steps_are_those_of_the_interval(one: float, other: float) -> None:
    first, last = sorted((round(one, 3), round(other, 3)))
    guidance = Guidance(5.0, 0.0, *guided_span(SIGMAS, first, last))
    expected = [first <= i / 10 < last for i in range(10)]
    assert [guidance.applies(float(sigma)) for sigma in SIGMAS[:-1]] == expected
    assert guidance.wanted is any(expected)


@pytest.mark.parametrize(("first", "last", "steps"), [(0.1, 0.3, [1, 2]), (0.3, 0.7, [3, 4, 5, 6]), (0, 0.6, range(6))])
def test_fractions_that_fall_on_a_step_include_it(first: float, last: float, steps: list[int]) -> None:
    guidance = Guidance(5.0, 0.0, *guided_span(SIGMAS, first, last))
    assert [i for i, sigma in enumerate(SIGMAS[:-1]) if guidance.applies(float(sigma))] == list(steps)


def test_a_sigma_between_two_steps_belongs_to_the_earlier_one() -> None:
    guidance = Guidance(5.0, 0.0, *guided_span(SIGMAS, 0.2, 0.5))
    middle = [float(np.sqrt(a * b)) for a, b in pairwise(SIGMAS[:-1])]
    assert [i for i, sigma in enumerate(middle) if guidance.applies(sigma)] == [2, 3, 4]


@pytest.mark.parametrize(("first", "last"), [(-0.1, 1), (0.5, 0.4), (0, 1.1), (math.nan, 1)])
def test_other_intervals_are_refused(first: float, last: float) -> None:
    with pytest.raises(UsageError, match="--guidance-interval"):
        guided_span(SIGMAS, first, last)


@pytest.mark.parametrize("scale", [1.0, 0.0, -3.0])
def test_a_scale_of_one_is_no_guidance(scale: float) -> None:
    assert not Guidance(scale).wanted
    assert not Guidance(scale).applies(1.0)


def test_in_comfyui_every_scale_except_one_guides() -> None:
    scales = (-1.0, 0.0, 0.5, 1.0, 1.0 + 1e-12, 1.001, 8.0)
    assert [guides(scale, comfyui_rule=True) for scale in scales] == [True, True, True, False, False, True, True]
    assert [guides(scale) for scale in scales] == [False, False, False, False, True, True, True]
    assert Guidance(0.5, comfyui_rule=True).applies(1.0)
    assert not Guidance(0.5).applies(1.0)
