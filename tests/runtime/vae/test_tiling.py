"""Tiles cover the picture, blend to a whole, and are closer to the untiled decode than diffusers' tiles."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.runtime.vae import tiling
from sdxl_trt.runtime.vae.tiling import decode_tiled, tile_starts, tile_weights

sides = st.integers(2, 200)


def enlarge(latents: np.ndarray, factor: int = 2) -> np.ndarray:
    """Decode each latent by itself, so that tiles must give exactly the whole."""
    return latents[:, :3].repeat(factor, axis=2).repeat(factor, axis=3)


@settings(deadline=None)
@given(sides, sides)
def test_starts_cover_the_side_and_overlap_by_a_quarter(size: int, tile: int) -> None:
    starts = tile_starts(size, tile)
    assert starts[0] == 0
    if tile >= size:
        assert starts == [0]
        return
    assert starts[-1] + tile == size
    strides = np.diff(starts)
    assert (strides >= 1).all()
    assert (tile - strides >= tile * 0.25).all()
    assert strides.max() - strides.min() <= 1, "evenly spread"
    # One tile fewer would not be enough.
    assert (len(starts) - 2) * (tile - np.ceil(tile * 0.25)) + tile < size


@settings(deadline=None)
@given(sides, sides, st.sampled_from([1, 2, 8]))
def test_weights_are_not_negative_and_add_up_to_one(size: int, tile: int, factor: int) -> None:
    tile = min(tile, size)
    starts = tile_starts(size, tile)
    weights = tile_weights(starts, tile, factor)
    total = np.zeros(size * factor)
    for start, weight in zip(starts, weights, strict=True):
        assert weight.dtype == np.float32
        assert (weight >= 0).all()
        total[start * factor : start * factor + tile * factor] += weight
    np.testing.assert_allclose(total, 1.0, atol=1e-6)


def test_a_tile_has_almost_no_weight_at_a_shared_edge() -> None:
    starts = tile_starts(128, 64)
    first, middle, last = tile_weights(starts, 64, 8)
    assert starts == [0, 32, 64]
    assert first[0] == last[-1] == 1.0, "the picture's own edge is not shared"
    assert max(first[-1], middle[0], middle[-1], last[0]) == pytest.approx(0.5 / 256)
    assert max(np.abs(np.diff(each)).max() for each in (first, middle, last)) == pytest.approx(1 / 256)


def test_tiles_too_small_to_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="tiles of 1 cannot overlap and cover 4"):
        tile_starts(4, 1)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(2, 16), st.integers(2, 16), st.integers(1, 2))
def test_a_local_decoder_gives_the_same_in_tiles(height: int, width: int, high: int, wide: int, count: int) -> None:
    latents = np.random.default_rng(height * 41 + width).standard_normal((count, 4, height, width), dtype=np.float32)
    tile = min(high, height), min(wide, width)
    seen = []

    def decode(part: np.ndarray) -> np.ndarray:
        seen.append(part.shape)
        return enlarge(part).astype(np.float16)

    result = decode_tiled(decode, latents, tile)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, enlarge(latents).astype(np.float16), rtol=0, atol=1e-5)
    assert set(seen) == {(count, 4, *tile)}, "a plan takes one shape"


def test_a_small_difference_between_tiles_leaves_no_step() -> None:
    """Each tile is a little brighter than the last, as group norms cause; the picture must change smoothly."""
    level = iter(np.linspace(0.0, 1.0, 9, dtype=np.float32))
    result = decode_tiled(
        lambda part: np.full_like(enlarge(part, 8), next(level)), np.zeros((1, 4, 128, 128)), (64, 64)
    )
    assert np.abs(np.diff(result, axis=2)).max() < 0.01
    assert np.abs(np.diff(result, axis=3)).max() < 0.01
    assert (result[0, 0, 0, 0], result[0, 0, -1, -1]) == (0.0, pytest.approx(1.0, abs=1e-6))


def test_memory_holds_only_the_result_and_a_few_tiles() -> None:
    latents = np.zeros((1, 4, 256, 256), np.float32)
    result = 3 * 2048 * 2048 * 4
    tile = 3 * 256 * 256 * 4
    tracemalloc.start()
    try:
        decode_tiled(lambda part: enlarge(part, 8), latents, (32, 32))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result <= peak < result + 6 * tile


@pytest.fixture(scope="module")
def autoencoder(pairs: Callable[[str], Any]) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(pairs("outline").base, subfolder="vae").eval()


def _psnr(left: np.ndarray, right: np.ndarray) -> float:
    """Return the PSNR of samples in [-1, 1], in dB."""
    return float(10 * np.log10(4.0 / np.mean((left.astype(np.float64) - right.astype(np.float64)) ** 2)))


@pytest.mark.parametrize(("height", "width"), [(48, 48), (40, 56), (33, 64)])
def test_tiles_are_closer_to_the_whole_than_diffusers(
    autoencoder: Any, height: int, width: int, rng: np.random.Generator
) -> None:
    """Both have the same tile size and least overlap; the latents have a gradient, like real ones."""
    import torch

    tile, factor = 16, 2
    slope = np.linspace(-2, 2, height, dtype=np.float32)[:, None] + np.linspace(-1, 1, width, dtype=np.float32)
    latents = rng.standard_normal((1, 4, height, width), dtype=np.float32) * 0.7 + slope
    autoencoder.tile_latent_min_size, autoencoder.tile_sample_min_size = tile, tile * factor
    with torch.no_grad():
        whole = autoencoder.decode(torch.from_numpy(latents)).sample.numpy()
        theirs = autoencoder.tiled_decode(torch.from_numpy(latents)).sample.numpy()

        def decode(part: np.ndarray) -> np.ndarray:
            return autoencoder.decode(torch.from_numpy(part.copy())).sample.numpy()

        ours = decode_tiled(decode, latents, (tile, tile))
    assert ours.shape == whole.shape
    assert _psnr(ours, whole) >= _psnr(theirs, whole)


def test_without_the_ramps_the_comparison_would_fail(
    autoencoder: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blending removes hard edges between tiles, and the PSNR detects them."""
    import torch

    latents = rng.standard_normal((1, 4, 48, 48), dtype=np.float32)

    def decode(part: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return autoencoder.decode(torch.from_numpy(part.copy())).sample.numpy()

    whole, blended = decode(latents), decode_tiled(decode, latents, (16, 16))
    monkeypatch.setattr(tiling, "_ramp", lambda starts, index, tile, factor: np.ones(tile * factor))
    hard = decode_tiled(decode, latents, (16, 16))
    assert _psnr(blended, whole) > _psnr(hard, whole) + 1.0
