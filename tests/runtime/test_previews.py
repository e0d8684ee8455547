"""Previews: about what the decoder makes of latents, and gone when the run is over."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.previews import Preview, approximate
from sdxl_trt.runtime.run import Step


def _step(index: int, total: int = 20, pictures: int = 2) -> Step:
    latents = np.zeros((pictures, 4, 3, 5), np.float32)
    latents[-1, 0] = 1.0
    return Step("base", index, total, slice(0, pictures), latents=latents)


def test_latents_are_mixed_to_colours_side_by_side(rng: np.random.Generator) -> None:
    latents = rng.standard_normal((2, 4, 3, 5)).astype(np.float32)
    latents /= latents.std(axis=(1, 2, 3), keepdims=True)
    pixels = approximate(latents)
    assert (pixels.shape, pixels.dtype) == ((3, 10, 3), np.uint8)
    red = sum(latents[1, channel, 2, 4] * factor for channel, factor in enumerate((0.392, -0.2634, 0.0568, -0.3112)))
    assert pixels[2, 9, 0] == round(min(max(red / 2 + 0.5, 0.0), 1.0) * 255)


def test_strong_noise_is_scaled_away(rng: np.random.Generator) -> None:
    noise = rng.standard_normal((1, 4, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(approximate(noise * 14.6), approximate(noise * 1.2), atol=1)


def test_a_preview_is_replaced_every_few_steps_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "x-preview.png"
    with Preview(path, 8) as preview:
        preview.show(_step(1))
        assert not path.exists()
        preview.show(_step(2))
        with Image.open(path) as image:
            assert image.size == (80, 24)
        preview.show(_step(4, pictures=1))
        with Image.open(path) as image:
            assert image.size == (40, 24)
    assert list(tmp_path.iterdir()) == []


def test_a_preview_goes_with_a_failed_run_too(tmp_path: Path) -> None:
    def fail() -> None:
        with Preview(tmp_path / "x.png", 8) as preview:
            preview.show(_step(2))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"mine")
    with pytest.raises(UsageError, match="there already"):
        Preview(tmp_path / "x.png", 8)
    assert (tmp_path / "x.png").read_bytes() == b"mine"


def test_no_preview_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Preview(None, 8) as preview:
        preview.show(_step(2))
    assert list(tmp_path.iterdir()) == []
