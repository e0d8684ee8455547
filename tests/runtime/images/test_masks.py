"""Mask files, the canvas of an outpainting, and the paste along a blurred mask."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.images.inputs import as_input
from sdxl_trt.runtime.images.masks import Overlay, as_mask, outpainted, read_channel, read_mask


def test_a_mask_is_the_luminance_of_its_file(tmp_path: Path, rng: np.random.Generator) -> None:
    colours = rng.integers(0, 256, (6, 5, 3), np.uint8)
    for name, picture in (("c.png", Image.fromarray(colours)), ("g.png", Image.fromarray(colours).convert("L")),
                          ("p.gif", Image.fromarray(colours).convert("P"))):  # fmt: skip
        picture.save(tmp_path / name)
        mask = read_mask(tmp_path / name)
        np.testing.assert_array_equal(mask.array, np.asarray(picture.convert("RGB").convert("L")))
        assert (mask.name, mask.size, mask.grey) == (name, (6, 5), name == "g.png")
    assert len({read_mask(tmp_path / name).sha256 for name in ("c.png", "g.png")}) == 2


def test_transparency_is_no_mask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png").array.min() == 255
    assert "the transparency is dropped" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no such file"), (b"text", "is not a PNG, JPEG, WebP"), (b"\x89PNG\r\n", "is ")]
)
def test_other_files_are_refused_in_a_line(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UsageError, match=r"^--mask .*x\.png") as caught:
        read_mask(tmp_path / "x.png")
    assert "\n" not in str(caught.value)


def test_arrays_are_masks_of_bools_or_greys() -> None:
    np.testing.assert_array_equal(as_mask(np.eye(3, dtype=bool)).array, np.eye(3, dtype=np.uint8) * 255)
    assert as_mask(np.eye(3, dtype=np.uint8)).size == (3, 3)
    for wrong in (np.zeros((3, 3)), np.zeros((1, 3, 3), bool), np.zeros((0, 3), np.uint8)):
        with pytest.raises(UsageError, match=r"is not a mask; give bool or uint8 \(height, width\)"):
            as_mask(wrong)


def test_a_channel_of_a_file_for_comfyuis_nodes(tmp_path: Path, rng: np.random.Generator) -> None:
    values = rng.integers(0, 256, (6, 5, 4), np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    for number, channel in enumerate(("red", "green", "blue", "alpha")):
        np.testing.assert_array_equal(read_channel(tmp_path / "a.png", "x", channel), values[..., number])
    Image.fromarray(values[..., :3]).save(tmp_path / "b.png")
    assert read_channel(tmp_path / "b.png", "x", "alpha") is None


def test_a_canvas_repeats_the_edges_and_its_margins_change() -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    picture = as_input(pixels)
    canvas, mask = outpainted(picture, as_mask(np.eye(2, 3, dtype=bool)), (1, 2, 3, 4))
    assert canvas.array.shape == (2 + 2 + 4, 3 + 1 + 3, 3)
    assert canvas.sha256 == picture.sha256
    np.testing.assert_array_equal(canvas.array[2:4, 1:4], pixels)
    np.testing.assert_array_equal(canvas.array[0, 0], pixels[0, 0])
    np.testing.assert_array_equal(canvas.array[-1, -1], pixels[-1, -1])
    np.testing.assert_array_equal(mask[2:4, 1:4], np.eye(2, 3) * 255)
    assert (np.delete(mask.ravel(), [15, 16, 17, 22, 23, 24]) == 255).all()
    with pytest.raises(UsageError, match=r"makes a picture of 16403x16002, more than \d+ pixels; give smaller"):
        outpainted(picture, None, (8000, 8000, 8400, 8000))
    with pytest.raises(UsageError, match="latents have none"):
        outpainted(as_input(np.zeros((1, 4, 2, 2), np.float32)), None, (1, 0, 0, 0))


@pytest.mark.parametrize("blur", [0, 1, 4])
def test_the_original_is_exact_where_the_blurred_mask_is_black(blur: int, rng: np.random.Generator) -> None:
    original, decoded = (rng.integers(0, 256, (40, 50, 3), np.uint8) for _ in range(2))
    mask = np.zeros((40, 50), np.uint8)
    mask[15:30, 12:40] = 200  # binary for the run, and so here
    hard = Image.fromarray(np.where(mask > 127, 255, 0).astype(np.uint8))
    alpha = np.asarray(hard.filter(ImageFilter.GaussianBlur(blur)) if blur else hard)
    result = Overlay(original, mask, blur).onto(decoded)
    np.testing.assert_array_equal(result[alpha == 0], original[alpha == 0])
    np.testing.assert_array_equal(result[alpha == 255], decoded[alpha == 255])
    between = (alpha > 0) & (alpha < 255)
    assert between.any() == (blur > 0)
    mixed = original + (decoded.astype(float) - original) * (alpha / 255.0)[..., None]
    np.testing.assert_allclose(result, mixed, rtol=0, atol=0.51)
