"""Pictures and masks as A1111 brings them to a size; the boxes are the examples of its own masking.py."""

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sdxl_trt.server import Options
from sdxl_trt.server.a1111.body import AskedMask, AskedStart
from sdxl_trt.server.a1111.pictures import _around, prepare, resized
from sdxl_trt.server.http import ApiError

OPTIONS = Options(max_pixels=1 << 20)


def _text(image: Image.Image, kind: str = "PNG", **more: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return base64.b64encode(buffer.getvalue()).decode()


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8))


def _mask(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), 255)
    return mask


def _asked(mask: Image.Image, **changed: Any) -> AskedMask:
    usual = {"blur": (0, 0), "fill": False, "invert": False, "whole": True, "padding": 0, "rounded": True}
    return AskedMask(_text(mask), **{**usual, **changed})


def test_mode_0_scales_each_side_by_itself() -> None:
    image = _noise(40, 24)
    expected = image.resize((64, 32), Image.Resampling.LANCZOS)
    assert resized(image, 0, (32, 64)).tobytes() == expected.tobytes()


@pytest.mark.parametrize(("width", "height"), [(80, 32), (32, 80), (64, 64)])
def test_mode_1_covers_the_size_and_keeps_the_centre(width: int, height: int) -> None:
    image = _noise(width, height)
    made = resized(image, 1, (64, 64))
    # A1111: scaled so that the shorter side fits, then pasted with its middle on the middle.
    across, down = (64 if width <= height else width * 64 // height), (64 if width >= height else height * 64 // width)
    scaled, expected = image.resize((across, down), Image.Resampling.LANCZOS), Image.new("RGB", (64, 64))
    expected.paste(scaled, (32 - across // 2, 32 - down // 2))
    assert made.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("width", "height"), [(80, 32), (32, 80)])
def test_mode_2_fits_into_the_size_and_repeats_the_edge(width: int, height: int) -> None:
    image = _noise(width, height)
    made = np.asarray(resized(image, 2, (64, 64)))
    wide = width > height
    across, down = (64, height * 64 // width) if wide else (width * 64 // height, 64)
    scaled = np.asarray(image.resize((across, down), Image.Resampling.LANCZOS))
    top, left = 32 - down // 2, 32 - across // 2
    assert np.array_equal(made[top : top + down, left : left + across], scaled)
    assert np.array_equal(made[0], scaled[0] if wide else made[0])
    assert np.array_equal(made[:, 0], made[:, 0] if wide else scaled[:, 0])
    assert np.array_equal(made[-1], scaled[-1] if wide else made[-1])


def test_a_picture_is_turned_and_laid_on_white() -> None:
    turned = Image.new("RGB", (32, 64), (255, 0, 0))
    exif = turned.getexif()
    exif[0x0112] = 6
    start = AskedStart(_text(turned, exif=exif), 1, 0.5)
    assert prepare(start, (32, 64), 8, OPTIONS).pixels.shape == (32, 64, 3)
    clear = Image.new("RGBA", (32, 32), (200, 0, 0, 0))
    assert (prepare(AskedStart(_text(clear), 0, 0.5), (32, 32), 8, OPTIONS).pixels == 255).all()


@pytest.mark.parametrize(
    ("box", "padding", "size", "expected"),
    [
        ((256, 0, 512, 256), 0, (512, 512), (256, 0, 512, 256)),
        # A region of 128x32, drawn in 512x512, is widened to 128x128.
        ((100, 200, 228, 232), 0, (512, 512), (100, 152, 228, 280)),
        ((0, 0, 128, 32), 0, (512, 512), (0, 0, 128, 128)),
        ((384, 480, 512, 512), 0, (512, 512), (384, 384, 512, 512)),
        ((200, 200, 232, 328), 16, (512, 512), (136, 184, 296, 344)),
        ((10, 10, 20, 20), 32, (512, 512), (0, 0, 52, 52)),
        ((0, 0, 512, 512), 32, (512, 1024), (0, 0, 512, 512)),
    ],
)
def test_the_box_around_a_mask(
    box: tuple[int, int, int, int], padding: int, size: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert _around(np.asarray(_mask((512, 512), box)), padding, size) == expected


def test_a_mask_reaches_the_latents_as_rounded_blocks() -> None:
    image = _noise(64, 64)
    made = prepare(AskedStart(_text(image), 0, 0.5, _asked(_mask((64, 64), (0, 0, 30, 16)))), (64, 64), 8, OPTIONS)
    assert made.mask is not None
    assert set(np.unique(made.mask)) == {0, 255}
    assert np.array_equal(made.mask[::8, ::8].repeat(8, 0).repeat(8, 1), made.mask)
    assert np.flatnonzero(made.mask[0, ::8]).tolist() == [0, 1, 2, 3]
    assert np.flatnonzero(made.mask[::8, 0]).tolist() == [0, 1]
    inverted = _asked(_mask((64, 64), (0, 0, 32, 16)), invert=True)
    other = prepare(AskedStart(_text(image), 0, 0.5, inverted), (64, 64), 8, OPTIONS)
    assert other.mask is not None
    assert np.array_equal(other.mask[::8, ::8] == 0, made.mask[::8, ::8] == 255)


def test_what_is_masked_is_filled_from_around_it_and_the_rest_is_kept() -> None:
    image = Image.new("RGB", (64, 64), (10, 200, 30))
    ImageDraw.Draw(image).rectangle((16, 16, 47, 47), (255, 0, 0))
    mask = _asked(_mask((64, 64), (16, 16, 48, 48)), fill=True)
    made = prepare(AskedStart(_text(image), 0, 0.5, mask), (64, 64), 8, OPTIONS).pixels
    # Laying blurred colours over each other rounds a few times.
    assert np.abs(made.astype(int) - (10, 200, 30)).max() <= 6
    outside = np.ones((64, 64), np.bool_)
    outside[16:48, 16:48] = False
    assert np.array_equal(made[outside], np.asarray(image)[outside])


@pytest.mark.parametrize("whole", [True, False])
def test_the_original_is_laid_over_outside_the_mask(*, whole: bool) -> None:
    image = _noise(96, 64)
    asked = _asked(_mask((96, 64), (8, 8, 40, 40)), whole=whole)
    made = prepare(AskedStart(_text(image), 0, 0.5, asked), (64, 96) if whole else (64, 64), 8, OPTIONS)
    assert made.paste is not None
    pasted = np.asarray(made.paste.onto(Image.new("RGB", (96, 64) if whole else (64, 64), (1, 2, 3))))
    outside = np.ones((64, 96), np.bool_)
    outside[8:40, 8:40] = False
    assert pasted.shape == (64, 96, 3)
    assert np.array_equal(pasted[outside], np.asarray(image)[outside])
    assert (pasted[~outside] == (1, 2, 3)).all()


@pytest.mark.parametrize(
    ("mask", "changed", "field"),
    [
        (Image.new("L", (64, 64)), {}, "mask"),
        (Image.new("L", (64, 64)), {"whole": False}, "mask"),
        (Image.new("L", (32, 64), 255), {"whole": False}, "mask"),
    ],
)
def test_a_mask_that_means_nothing_is_refused(mask: Image.Image, changed: dict[str, Any], field: str) -> None:
    with pytest.raises(ApiError) as caught:
        prepare(AskedStart(_text(_noise(64, 64)), 0, 0.5, _asked(mask, **changed)), (64, 64), 8, OPTIONS)
    assert (caught.value.status, caught.value.param) == (422, field)


@pytest.mark.parametrize("text", ["", "AAAA", "https://example.org/a.png", "data:text/html;base64,AAAA", "!!"])
def test_what_is_no_picture_is_refused(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        prepare(AskedStart(text, 0, 0.5), (64, 64), 8, OPTIONS)
    assert caught.value.status in (400, 413)


def test_a_picture_that_is_far_too_narrow_is_refused() -> None:
    narrow = Image.new("RGB", (1, 1 << 18))
    with pytest.raises(ApiError, match="too narrow"):
        prepare(AskedStart(_text(narrow), 1, 0.5), (1024, 1024), 8, OPTIONS)
