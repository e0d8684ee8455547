"""The scaling undone before the decoder, the choice of tiles, and outputs that are not a picture."""

from collections.abc import Mapping, Sequence
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines.backends.ort.providers import shape_limits
from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.bundle.manifest import Vae
from sdxl_trt.engines.bundle.profile import Profile
from sdxl_trt.engines.errors import CorruptError
from sdxl_trt.engines.residency.pool import EnginePool
from sdxl_trt.mini.embedded import bundle_path
from sdxl_trt.runtime.vae.decode import decode_latents
from sdxl_trt.runtime.vae.tile_sizes import choose_tile, decoder_sizes


class Spec:
    name, shape = "latent_sample", ("pictures", 4, "height", "width")

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


class Enlarger:
    """A decoder of factor 2 that returns enlarged latents, and records its inputs."""

    def __init__(self, dtype: str = "float32", spoilt: int | None = None) -> None:
        self.dtype, self.spoilt, self.given = dtype, spoilt, []

    @property
    def component(self) -> Any:
        return self

    def input(self, name: str) -> Spec:
        assert name == "latent_sample"
        return Spec(self.dtype)

    def infer(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        latents = inputs["latent_sample"]
        self.given.append(latents)
        sample = latents[:, :3].repeat(2, axis=2).repeat(2, axis=3)
        if self.spoilt == len(self.given):
            sample[0, 0, 0, 0] = np.nan
        return {"sample": sample}


def vae(**settings: Any) -> Vae:
    return Vae(decoder="d", encoder=None, scaling_factor=0.5, latent_channels=4, factor=2, **settings)


def test_scaling_is_undone_once_whole_or_in_tiles(rng: np.random.Generator) -> None:
    latents = rng.standard_normal((1, 4, 20, 12), dtype=np.float32)
    whole = decode_latents(Enlarger(), vae(), latents)
    np.testing.assert_array_equal(whole[0, :, ::2, ::2], latents[0, :3] / 0.5)
    np.testing.assert_allclose(decode_latents(Enlarger(), vae(), latents, tile=(8, 8)), whole, rtol=0, atol=1e-5)


def test_mean_and_deviation_are_undone_as_in_diffusers(rng: np.random.Generator) -> None:
    latents = rng.standard_normal((2, 4, 4, 4), dtype=np.float32)
    mean, deviation = (0.1, -0.2, 0.3, 0.0), (1.0, 2.0, 0.5, 1.5)
    whole = decode_latents(Enlarger(), vae(latents_mean=mean, latents_std=deviation), latents)
    # StableDiffusionXLPipeline: latents * latents_std / scaling_factor + latents_mean
    expected = latents * np.float32(deviation).reshape(1, 4, 1, 1) / 0.5 + np.float32(mean).reshape(1, 4, 1, 1)
    np.testing.assert_allclose(whole[:, :, ::2, ::2], expected[:, :3], rtol=1e-6)


@pytest.mark.parametrize("tile", [None, (8, 8)])
def test_the_decoder_gets_its_own_dtype(tile: tuple[int, int] | None) -> None:
    engine = Enlarger("float16")
    decode_latents(engine, vae(), np.ones((1, 4, 12, 12), np.float32), tile=tile)
    assert {latents.dtype for latents in engine.given} == {np.dtype(np.float16)}


@pytest.mark.parametrize(("tile", "spoilt"), [(None, 1), ((8, 8), 1), ((8, 8), 4)])
def test_nan_in_any_tile_is_refused(tile: tuple[int, int] | None, spoilt: int) -> None:
    with pytest.raises(CorruptError, match=r"NaN or infinity.*--vae-precision fp32"):
        decode_latents(Enlarger(spoilt=spoilt), vae(), np.ones((1, 4, 12, 12), np.float32), tile=tile)


@pytest.mark.parametrize(
    ("latents", "takes", "tiled", "expected"),
    [
        ((128, 128), None, False, None),
        ((128, 128), ((64, 64), (160, 160)), False, None),
        ((128, 128), ((64, 64), (128, 128)), False, None),
        ((128, 128), ((64, 64), (64, 64)), False, (64, 64)),
        ((128, 64), ((32, 32), (64, 64)), False, (64, 64)),
        ((128, 48), ((32, 32), (64, 64)), False, (64, 48)),
        ((48, 128), ((32, 32), (64, 32)), False, (48, 32)),
        ((64, 64), ((32, 32), (64, 64)), True, None),
        ((128, 128), None, True, (64, 64)),
        ((128, 32), None, True, (64, 32)),
        ((128, 128), ((48, 48), (160, 160)), True, (64, 64)),
        ((128, 128), ((16, 48), (32, 160)), True, (32, 64)),
        # A plan of one size has no smaller tile.
        ((128, 128), ((128, 128), (128, 128)), True, None),
        ((256, 128), ((96, 96), (192, 192)), True, (96, 96)),
    ],
)
def test_the_tile_fits_the_decoder_and_the_request(latents: Any, takes: Any, tiled: bool, expected: Any) -> None:
    assert choose_tile(latents, takes and [takes], 8, tiled=tiled) == expected


FIXED_SIZES = [((128, 128), (128, 128)), ((64, 64), (64, 64)), ((32, 48), (32, 48))]


@pytest.mark.parametrize(
    ("latents", "tiled", "expected"),
    [
        ((128, 128), False, None),
        ((128, 128), True, (64, 64)),
        ((160, 160), False, (128, 128)),
        ((160, 96), False, (64, 64)),
        ((64, 64), False, None),
        ((48, 128), False, (32, 48)),
        # Smaller than all sizes: the engine will report what it takes.
        ((16, 16), False, (32, 48)),
    ],
)
def test_the_largest_of_several_sizes_that_fits_is_chosen(latents: Any, tiled: bool, expected: Any) -> None:
    assert choose_tile(latents, FIXED_SIZES, 8, tiled=tiled) == expected


def _pool(provider: str, sizes: dict[str, list[tuple[Any, Any]]], **replaced: str) -> Any:
    """Return a fake pool with plans; `sizes` are the (smallest, largest) latents of the profiles by component."""
    records = {
        name: SimpleNamespace(key=SimpleNamespace(profiles=[
            Profile(shapes={"latent_sample": ((1, 4, *low), (1, 4, *low), (1, 4, *high))}) for low, high in spans]))
        for name, spans in sizes.items()
    }  # fmt: skip
    return _with_profiles(provider=provider, records=records, stand_in=lambda name: replaced.get(name, name))


def _with_profiles(**pool: Any) -> Any:
    """Return a stand-in for a pool that answers for its profiles as the pool itself does."""
    made = SimpleNamespace(**pool)
    made.profiles = MethodType(EnginePool.profiles, made)
    return made


def test_without_plans_any_size_is_taken() -> None:
    assert decoder_sizes(_pool("ort-cpu", {}), "d") is None
    assert decoder_sizes(_pool("tensorrt", {"unet": [((1, 1), (2, 2))]}), "d") is None


def test_a_plan_takes_the_sizes_of_all_its_profiles() -> None:
    spans = [((8, 24), (64, 96)), ((16, 16), (16, 16))]
    assert decoder_sizes(_pool("tensorrt", {"d": spans}), "d") == spans


def test_the_component_that_actually_runs_gives_the_sizes() -> None:
    plans = {"d": [((8, 8), (64, 64))], "d_bf16": [((8, 8), (160, 160))]}
    assert decoder_sizes(_pool("tensorrt", plans, d="d_bf16"), "d") == plans["d_bf16"]
    assert decoder_sizes(_pool("tensorrt", plans), "d") == plans["d"]


def test_onnxruntimes_tensorrt_takes_the_sizes_of_its_engines() -> None:
    """A wide decoder is compiled for tiles; the embedded pair's own, in fp16, for all its sizes."""
    bundle = read_bundle(bundle_path())
    decoder = bundle.manifest.base.vae.decoder
    pool = _with_profiles(provider="ort-tensorrt", bundle=bundle, records={}, stand_in=lambda name: name)
    limits = shape_limits(bundle, decoder).shapes["latent_sample"]
    assert decoder_sizes(pool, decoder) == [(limits[0][2:], limits[2][2:])]
