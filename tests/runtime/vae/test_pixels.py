"""Tensors to pixels, rounded as in diffusers and truncated as in ComfyUI."""

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.runtime.vae.decode import to_uint8, to_uint8_truncated


def _diffusers(sample: np.ndarray) -> np.ndarray:
    import torch
    from diffusers.image_processor import VaeImageProcessor

    pictures = VaeImageProcessor(vae_scale_factor=8).postprocess(torch.from_numpy(sample), output_type="pil")
    return np.stack([np.asarray(picture) for picture in pictures])


def test_pixels_are_diffusers(rng: np.random.Generator) -> None:
    sample = (rng.standard_normal((2, 3, 24, 16)) * 0.8).astype(np.float32)
    ours = to_uint8(sample)
    assert (ours.shape, ours.dtype) == ((2, 24, 16, 3), np.uint8)
    np.testing.assert_array_equal(ours, _diffusers(sample))


def test_every_half_step_is_rounded_as_in_diffusers() -> None:
    """The 511 pixel values and midpoints between two, each with its float32 neighbours."""
    exact = (np.arange(511, dtype=np.float32) / 510) * 2 - 1
    values = np.stack([np.nextafter(exact, np.float32(-2)), exact, np.nextafter(exact, np.float32(2))])
    sample = np.broadcast_to(values.reshape(1, 1, 3, 511), (1, 3, 3, 511)).copy()
    np.testing.assert_array_equal(to_uint8(sample), _diffusers(sample))


@settings(deadline=None)
@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_any_value_is_a_pixel(value: float) -> None:
    pixel = int(to_uint8(np.full((1, 3, 1, 1), value, np.float32))[0, 0, 0, 0])
    assert pixel == (0 if value <= -1 else 255 if value >= 1 else pixel)
    assert abs(pixel - (np.clip(value, -1, 1) + 1) * 127.5) <= 0.501


def test_channels_and_half_precision_are_kept() -> None:
    sample = np.stack([np.full((1, 2), value, np.float16) for value in (-1, 0, 1)])[None]
    assert to_uint8(sample)[0, 0].tolist() == [[0, 128, 255]] * 2


def test_comfyui_truncates_and_diffusers_rounds(rng: np.random.Generator) -> None:
    """Against the operations of ComfyUI's VAE and SaveImage, in torch."""
    import torch

    sample = (rng.standard_normal((2, 3, 24, 16)) * 0.8).astype(np.float32)
    decoded = torch.clamp((torch.from_numpy(sample) + 1.0) / 2.0, min=0.0, max=1.0).movedim(1, -1)
    expected = np.clip(255.0 * decoded.numpy(), 0, 255).astype(np.uint8)
    ours = to_uint8_truncated(sample)
    assert (ours.shape, ours.dtype) == ((2, 24, 16, 3), np.uint8)
    np.testing.assert_array_equal(ours, expected)
    assert (to_uint8(sample).astype(int) - ours).max() == 1
    assert to_uint8_truncated(np.array([-9, -1, 1, 9], np.float32).reshape(1, 1, 1, 4)).ravel().tolist() == [
        0,
        0,
        255,
        255,
    ]


def test_pixels_are_those_that_comfyui_saved() -> None:
    with np.load(Path(__file__).parents[2] / "comfyui" / "pixels.npz") as recorded:
        np.testing.assert_array_equal(to_uint8_truncated(recorded["decoded"][None])[0], recorded["pixels"])
