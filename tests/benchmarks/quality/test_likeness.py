"""PSNR against closed forms, SSIM against scikit-image."""

import numpy as np
import pytest

from sdxl_trt.benchmarks.quality.likeness import psnr, ssim


def _pictures(high: int, wide: int, grain: int) -> tuple[np.ndarray, np.ndarray]:
    y, x, c = np.ogrid[:high, :wide, :3]
    clean = (x * x // 9 + y * 5 + c * 40) % 200 + 28
    noise = np.random.default_rng(5).integers(-grain, grain + 1, clean.shape)
    return clean.astype(np.uint8), np.clip(clean + noise, 0, 255).astype(np.uint8)


# scikit-image 0.26.0 on these pictures: peak_signal_noise_ratio(clean, noisy), and structural_similarity(noisy, clean,
# channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False), both with data_range=255.
@pytest.mark.parametrize(
    ("shape", "grain", "similarity", "ratio"),
    [
        ((11, 11), 4, 0.967108772372975, 39.902497201426925),
        ((16, 24), 10, 0.8561274980364127, 32.53408510388026),
        ((48, 33), 90, 0.22793610703601605, 14.155144159330334),
    ],
)
def test_both_equal_scikit_images(shape: tuple[int, int], grain: int, similarity: float, ratio: float) -> None:
    clean, noisy = _pictures(*shape, grain)
    assert ssim(noisy, clean) == pytest.approx(similarity, abs=1e-12)
    assert psnr(noisy, clean, 255) == pytest.approx(ratio, abs=1e-12)


def test_ssim_of_flat_pictures_compares_their_tones() -> None:
    black, grey, white = (np.full((12, 12, 3), tone, np.uint8) for tone in (0, 100, 255))
    c1 = (0.01 * 255) ** 2
    assert ssim(grey, grey) == pytest.approx(1.0, abs=1e-12)
    assert ssim(white, grey) == pytest.approx((2 * 255 * 100 + c1) / (255**2 + 100**2 + c1), abs=1e-9)
    assert ssim(black, white) == pytest.approx(c1 / (255**2 + c1), abs=1e-9)


def test_ssim_of_a_negative_is_negative() -> None:
    clean, _ = _pictures(32, 32, 1)
    assert ssim(255 - clean, clean) < -0.4


def test_psnr_uses_the_range_of_the_reference() -> None:
    reference = np.array([-3.0, 1.0, 5.0], np.float32)
    assert psnr(reference + np.float32(0.5), reference) == pytest.approx(20 * np.log10(8 / 0.5))
    assert psnr(reference + np.float32(0.5), reference, 2.0) == pytest.approx(20 * np.log10(2 / 0.5))
    assert psnr(np.full(4, 3.0), np.full(4, 2.0)) == pytest.approx(20 * np.log10(2 / 1))
    assert psnr(np.full(4, 0.1), np.zeros(4)) == pytest.approx(20.0)


def test_psnr_is_none_for_equal_arrays_and_zero_for_nonfinite_ones() -> None:
    zeros = np.zeros(4, np.float16)
    assert psnr(zeros, zeros) is None
    assert psnr(np.array([0.0, np.nan]), np.array([0.0, 1.0])) == 0.0
    assert psnr(np.array([0.0, np.inf]), np.array([0.0, 1.0])) == 0.0


def test_shapes_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        psnr(np.zeros(3), np.zeros((3, 1)))
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(np.zeros((10, 64, 3), np.uint8), np.zeros((10, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="equal shapes"):
        ssim(np.zeros((12, 12, 3), np.uint8), np.zeros((12, 13, 3), np.uint8))
