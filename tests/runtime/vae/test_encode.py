"""Pictures to latents: draws from the posterior, the scaling, tiles, and outputs that are not finite."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines.bundle.manifest import Vae
from sdxl_trt.engines.bundle.profile import Profile
from sdxl_trt.engines.errors import CorruptError
from sdxl_trt.runtime.vae.encode import Moments, encode, encoder_sizes
from sdxl_trt.runtime.vae.tiling import encode_tiled


def vae(**settings: Any) -> Vae:
    return Vae(decoder="d", encoder="e", scaling_factor=0.5, latent_channels=2, factor=2, **settings)


class Shrinker:
    """An encoder of factor 2: mean and log variance are every other pixel; it records its inputs."""

    def __init__(self, dtype: str = "float32", spoilt: int | None = None) -> None:
        self.dtype, self.spoilt, self.given = dtype, spoilt, []

    @property
    def component(self) -> Any:
        return self

    def input(self, name: str) -> Any:
        assert name == "sample"
        return SimpleNamespace(name=name, dtype=self.dtype)

    def infer(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        sample = inputs["sample"]
        self.given.append(sample)
        small = sample[:, [0, 1, 0, 0], ::2, ::2].copy()
        if self.spoilt == len(self.given):
            small[0, 0, 0, 0] = np.inf
        return {"latent_parameters": small}


@pytest.fixture
def pixels(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (24, 40, 3), np.uint8)


@pytest.mark.parametrize("tile", [None, (8, 8)])
def test_moments_are_the_encoders_whole_or_in_tiles(pixels: np.ndarray, tile: Any) -> None:
    engine = Shrinker("float16")
    moments = encode(engine, vae(), pixels, tile=tile)
    expected = pixels[None, ::2, ::2].transpose(0, 3, 1, 2) / 127.5 - 1.0
    np.testing.assert_allclose(moments.mean, expected[:, :2], rtol=0, atol=1e-3)
    np.testing.assert_allclose(moments.deviation[:, 0], np.exp(expected[:, 0] / 2), rtol=2e-3)
    assert {sample.dtype for sample in engine.given} == {np.dtype(np.float16)}
    assert {sample.shape for sample in engine.given} == {(1, 3, 24, 40) if tile is None else (1, 3, 16, 16)}


@pytest.mark.parametrize(("tile", "spoilt"), [(None, 1), ((8, 8), 4)])
def test_infinity_in_any_tile_is_refused(pixels: np.ndarray, tile: Any, spoilt: int) -> None:
    with pytest.raises(CorruptError, match=r"NaN or infinity.*--vae-precision fp32"):
        encode(Shrinker(spoilt=spoilt), vae(), pixels, tile=tile)


def test_a_draw_and_the_mean_are_scaled_as_in_diffusers(rng: np.random.Generator) -> None:
    mean, noise = (rng.standard_normal((1, 2, 3, 4), dtype=np.float32) for _ in range(2))
    moments = Moments(mean, np.full_like(mean, 0.25))
    np.testing.assert_allclose(moments.drawn(noise, vae()), (mean + 0.25 * noise) * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(moments.drawn(None, vae()), mean * np.float32(0.5))
    centre, spread = (0.1, -0.2), (2.0, 0.5)
    found = moments.drawn(None, vae(latents_mean=centre, latents_std=spread))
    # prepare_latents: (init_latents - latents_mean) * scaling_factor / latents_std
    shape = (1, 2, 1, 1)
    expected = (mean - np.float32(centre).reshape(shape)) * 0.5 / np.float32(spread).reshape(shape)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_each_draw_has_its_own_noise(rng: np.random.Generator) -> None:
    noise = rng.standard_normal((3, 2, 3, 4), dtype=np.float32)
    moments = Moments(np.zeros((1, 2, 3, 4), np.float32), np.ones((1, 2, 3, 4), np.float32))
    np.testing.assert_array_equal(moments.drawn(noise, vae()), noise * np.float32(0.5))


def test_profiles_in_pixels_are_returned_in_latents() -> None:
    profile = Profile(shapes={"sample": ((1, 3, 512, 256), (1, 3, 512, 512), (1, 3, 512, 1024))})
    pool: Any = SimpleNamespace(profiles=lambda name: [profile] if name == "e" else [])
    assert encoder_sizes(pool, "e", 8) == [((64, 32), (64, 128))]
    assert encoder_sizes(pool, "other", 8) is None


@pytest.fixture(scope="module")
def autoencoder(pairs: Callable[[str], Any]) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(pairs("outline").base, subfolder="vae").eval()


def test_tiles_are_closer_to_the_whole_than_diffusers(autoencoder: Any, rng: np.random.Generator) -> None:
    """Both have the same tile size and overlap; the picture has a gradient, like real ones."""
    import torch

    height, width, factor = 96, 112, 2
    slope = np.linspace(-0.6, 0.6, height, dtype=np.float32)[:, None] + np.linspace(-0.4, 0.4, width, dtype=np.float32)
    sample = np.clip(rng.standard_normal((1, 3, height, width), dtype=np.float32) * 0.1 + slope, -1, 1)
    autoencoder.tile_latent_min_size, autoencoder.tile_sample_min_size = 16, 32

    def moments(part: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return autoencoder.quant_conv(autoencoder.encoder(torch.from_numpy(part.copy()))).numpy()

    whole = moments(sample)
    with torch.no_grad():
        theirs = autoencoder._tiled_encode(torch.from_numpy(sample)).numpy()
    ours = encode_tiled(moments, sample, (16, 16), factor)
    assert ours.shape == whole.shape
    errors = [np.mean((found - whole) ** 2) for found in (ours, theirs)]
    assert 0 < errors[0] <= errors[1] * 1.02
