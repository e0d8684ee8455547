"""Previews: close to the decoder's picture, early in a run, and removed at its end."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.bundle.manifest import Manifest
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.mini.embedded import bundle_path
from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.cli.preview import Preview
from sdxl_trt.runtime.pipeline.run import Step
from sdxl_trt.runtime.vae.preview import EMBEDDED, SDXL, Colours, approximate, colours_of


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return read_bundle(bundle_path())


@pytest.fixture(scope="module")
def manifest(bundle: Bundle) -> Manifest:
    return bundle.manifest


def _step(index: int, total: int = 20, pictures: int = 2) -> Step:
    latents = np.zeros((pictures, 4, 3, 5), np.float32)
    return Step("base", index, total, slice(0, pictures), latents=latents, denoised=latents)


def test_latents_are_mixed_to_colours_side_by_side(rng: np.random.Generator) -> None:
    latents = rng.standard_normal((2, 4, 3, 5)).astype(np.float32)
    pixels = approximate(latents, SDXL)
    assert (pixels.shape, pixels.dtype) == ((3, 10, 3), np.uint8)
    factors = (0.3651, -0.2533, 0.1076, -0.3165)
    red = sum(latents[1, channel, 2, 4] * factor for channel, factor in enumerate(factors)) + 0.1084
    assert pixels[2, 9, 0] == round(min(max(red / 2 + 0.5, 0.0), 1.0) * 255)


def _likeness(pixels: np.ndarray, picture: np.ndarray) -> float:
    """Return the correlation of a preview with a picture of the same size, over all pixels and colours."""
    return float(np.corrcoef(pixels.ravel(), picture.ravel())[0, 1])


def test_the_embedded_pairs_previews_resemble_its_pictures(manifest: Manifest) -> None:
    request = Request("a large red star on a blue background", seed=7, steps=4, handoff=0.5)
    with open_bundle() as pipeline:
        steps = list(pipeline.steps(request))
        (picture,) = (step.picture for step in steps if step.picture)
        final = pipeline.run.final
    small = np.asarray(picture.image.reduce(manifest.base.vae.factor), np.float64)
    colours = colours_of(manifest)
    assert _likeness(approximate(final, colours), small) > 0.98
    assert np.abs(approximate(final, colours) - small).mean() < 25
    shown = [approximate(step.denoised, colours) for step in steps if step.denoised is not None]
    assert len(shown) == 4
    assert _likeness(shown[0], small) > 0.85, "the picture is recognizable long before the end"
    assert _likeness(approximate(final, SDXL), small) < 0.5, "another model's colours would fit as well"


def test_colours_are_those_of_the_decoder_in_use(manifest: Manifest) -> None:
    assert colours_of(manifest) == EMBEDDED, "the pair was retrained: fit its colours again"
    source = msgspec.structs.replace(manifest.components["vae_decoder"].source, sha256="0" * 64)
    decoder = msgspec.structs.replace(manifest.components["vae_decoder"], source=source)
    other = msgspec.structs.replace(manifest, components=manifest.components | {"vae_decoder": decoder})
    assert colours_of(other) == SDXL
    wide = msgspec.structs.replace(manifest.base, vae=msgspec.structs.replace(manifest.base.vae, latent_channels=16))
    grey = colours_of(msgspec.structs.replace(manifest, base=wide))
    assert grey == Colours(((0.0625,) * 3,) * 16, (0.0, 0.0, 0.0))
    assert approximate(np.ones((1, 16, 2, 2), np.float32), grey).tolist() == [[[255] * 3] * 2] * 2


def test_a_preview_is_replaced_every_few_steps_and_removed(tmp_path: Path, bundle: Bundle) -> None:
    path = tmp_path / "x-preview.png"
    with Preview(path, bundle) as preview:
        preview.show(_step(1))
        assert not path.exists()
        preview.show(_step(2))
        with Image.open(path) as image:
            assert image.size == (80, 24)
        preview.show(_step(4, pictures=1))
        with Image.open(path) as image:
            assert image.size == (40, 24)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_removes_its_preview_too(tmp_path: Path, bundle: Bundle) -> None:
    def fail() -> None:
        with Preview(tmp_path / "x.png", bundle) as preview:
            preview.show(_step(2))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_overwritten(tmp_path: Path, bundle: Bundle) -> None:
    (tmp_path / "x.png").write_bytes(b"mine")
    with pytest.raises(UsageError, match="there already"):
        Preview(tmp_path / "x.png", bundle)
    assert (tmp_path / "x.png").read_bytes() == b"mine"


def test_without_a_path_nothing_is_written(tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Preview(None, bundle) as preview:
        preview.show(_step(2))
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_without_a_tiny_decoder_makes_no_preview_by_one(tmp_path: Path, bundle: Bundle) -> None:
    vae = msgspec.structs.replace(bundle.manifest.base.vae, tiny=None)
    base = msgspec.structs.replace(bundle.manifest.base, vae=vae)
    without = Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, base=base))
    with pytest.raises(UsageError, match="no tiny decoder; export it with --tiny-vae"):
        Preview(tmp_path / "x.png", without, "tiny")
