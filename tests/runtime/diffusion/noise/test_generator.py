"""Noise against torch.randn itself: the same seed gives the same picture."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.runtime.diffusion.noise.generator import TorchGenerator
from sdxl_trt.runtime.diffusion.noise.sources import BatchNoise

TOLERANCE = 1e-6  # torch evaluates logarithm and cosine with its own polynomials: 3 units in the last place
SEEDS = [0, 1, 7, 42, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**63 + 5, 2**64 - 1]


def _torch(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(shape, generator=generator).numpy() for shape in shapes]


def _check(seed: int, *shapes: tuple[int, ...]) -> None:
    ours = TorchGenerator(seed)
    for shape, expected in zip(shapes, _torch(seed, *shapes), strict=True):
        values = ours.randn(shape)
        assert values.dtype == np.float32
        assert values.shape == shape
        np.testing.assert_allclose(values, expected, rtol=0, atol=TOLERANCE, err_msg=f"seed {seed}, shape {shape}")


@pytest.mark.parametrize("seed", SEEDS)
def test_latents_of_a_picture_are_torchs(seed: int) -> None:
    _check(seed, (1, 4, 16, 24))


@pytest.mark.parametrize("shape", [(16,), (17,), (31,), (32,), (33,), (3, 7), (1, 4, 5, 5), (4099,), (1, 4, 128, 128)])
def test_blocks_of_16_and_an_incomplete_last_block(shape: tuple[int, ...]) -> None:
    _check(42, shape)


@pytest.mark.parametrize("size", range(16))
def test_few_values_are_drawn_one_by_one(size: int) -> None:
    ours, (expected,) = TorchGenerator(7).randn((size,)), _torch(7, (size,))
    np.testing.assert_array_max_ulp(ours, expected, maxulp=1)


def test_a_scalar_has_no_axis() -> None:
    _check(3, ())


@pytest.mark.parametrize(
    "shapes",
    [
        [(16,), (16,)],
        [(17,), (17,), (5,), (64,)],
        [(3,), (2,)],  # a pair's sine value is cached
        [(3,), (20,), (2,), (1,)],  # and survives a large draw
        [(1, 4, 8, 8)] * 3,
    ],
)
def test_draws_continue_one_stream(shapes: list[tuple[int, ...]]) -> None:
    _check(11, *shapes)


@settings(deadline=None)
@given(seed=st.integers(0, 2**64 - 1), sizes=st.lists(st.integers(0, 70), max_size=6))
def test_any_seed_and_any_sequence(seed: int, sizes: list[int]) -> None:
    _check(seed, *[(size,) for size in sizes])


def test_the_first_picture_of_a_batch_has_the_noise_of_a_single_picture() -> None:
    batch, one = TorchGenerator(5).randn((3, 4, 8, 8)), TorchGenerator(5).randn((1, 4, 8, 8))
    np.testing.assert_array_equal(batch[:1], one)


def test_the_high_half_of_a_seed_is_ignored_as_in_torch() -> None:
    np.testing.assert_array_equal(TorchGenerator(7).randn((64,)), TorchGenerator(2**32 + 7).randn((64,)))
    assert np.abs(TorchGenerator(7).randn((64,)) - TorchGenerator(8).randn((64,))).max() > 1


def test_generators_do_not_share_state() -> None:
    one, other = TorchGenerator(1), TorchGenerator(1)
    np.random.default_rng(0)
    first = one.randn((32,))
    np.testing.assert_array_equal(other.randn((32,)), first)
    assert np.abs(one.randn((32,)) - first).max() > 0.1


def test_a_large_draw_is_standard_normal_and_finite() -> None:
    values = TorchGenerator(0).randn((1, 4, 256, 256))
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01


def test_a_batch_has_one_stream_that_every_draw_restarts() -> None:
    """As in ComfyUI's prepare_noise, and its ancestral noise from seed + 1."""
    noise, shape = BatchNoise(11, 3), (4, 8, 8)
    for _ in range(2):
        np.testing.assert_allclose(noise.draw(shape), _torch(11, (3, *shape))[0], rtol=0, atol=1e-6)
    first, second = _torch(12, (3, *shape), (3, *shape))
    draw = noise.source(shape, slice(1, 3))
    np.testing.assert_allclose(draw(2.0, 1.0), first[1:], rtol=0, atol=1e-6)
    np.testing.assert_allclose(draw(1.0, 0.5), second[1:], rtol=0, atol=1e-6)
