"""Pictures to start from: rotated, converted to RGB, fitted; other files are refused in one line each."""

import base64
import contextlib
import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.images import inputs as input_pictures
from sdxl_trt.runtime.images.inputs import as_input, fitted, read_input


@pytest.fixture
def colours(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (6, 10, 3), np.uint8)


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], Any]:
    def load(content: bytes) -> Any:
        path = tmp_path / "in.png"
        path.write_bytes(content)
        return read_input(path)

    return load


def test_pixels_come_with_the_name_and_the_digest_of_their_file(colours: np.ndarray, read: Any) -> None:
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        content = _saved(Image.fromarray(colours), kind, **options)
        picture = read(content)
        np.testing.assert_array_equal(picture.pixels, colours)
        assert (picture.name, picture.sha256) == ("in.png", hashlib.sha256(content).hexdigest())
        assert (picture.size, picture.latents) == ((6, 10), None)
    near = read(_saved(Image.fromarray(np.full((8, 8, 3), 90, np.uint8)), "JPEG")).pixels
    assert np.abs(near.astype(int) - 90).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_rotated_as_its_exif_data_states(colours: np.ndarray, read: Any, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = read(_saved(Image.fromarray(colours), "PNG", exif=exif)).pixels
    # EXIF 2.3: which sides of the picture the stored first row and first column are.
    stored = colours if orientation < 5 else colours.transpose(1, 0, 2)
    flips = {1: "", 2: "h", 3: "hv", 4: "v", 5: "", 6: "h", 7: "hv", 8: "v"}[orientation]
    meant = stored[:, ::-1] if "h" in flips else stored
    np.testing.assert_array_equal(found, meant[::-1] if "v" in flips else meant)


def test_every_kind_of_pixel_is_converted_to_rgb(colours: np.ndarray, read: Any, caplog: Any) -> None:
    grey = colours[:, :, 0]
    threefold = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(read(_saved(Image.fromarray(grey), "PNG")).pixels, threefold)
    palette = Image.fromarray(colours // 128 * 255).convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(read(_saved(palette, "PNG")).pixels, colours // 128 * 255)
    bits = Image.fromarray(grey).convert("1")
    assert set(np.unique(read(_saved(bits, "PNG")).pixels)) <= {0, 255}
    # Naively, as Pillow and therefore both peers do: no ink is white, full ink is black.
    for ink, value in ((0, 255), (255, 0)):
        cmyk = Image.new("CMYK", (8, 8), (ink, ink, ink, ink))
        assert (read(_saved(cmyk, "JPEG")).pixels == value).all()
    assert caplog.records == []


def test_colours_of_transparent_pixels_are_used_with_a_warning(colours: np.ndarray, read: Any, caplog: Any) -> None:
    image = Image.fromarray(colours)
    image.putalpha(255)
    read(_saved(image, "PNG"))
    assert caplog.records == []
    image.putalpha(0)
    np.testing.assert_array_equal(read(_saved(image, "PNG")).pixels, colours)
    assert "transparent in places" in caplog.text


RECORDED = json.loads((Path(__file__).parents[2] / "comfyui" / "images.json").read_bytes())
FILES = {case["file"]: case for case in RECORDED if "file" in case}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_that_comfyui_loads(name: str, read: Any) -> None:
    case = FILES[name]
    expected = np.array(case["pixels"]).reshape(case["shape"])[0]
    found = read(base64.b64decode(case["bytes"])).pixels
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= (0 if case["exact"] else 1)


def test_crops_are_those_that_comfyui_encodes() -> None:
    for case in (case for case in RECORDED if "crop" in case):
        (width, height), (to_width, to_height), (left, top) = case["crop"], case["size"], case["offset"]
        places = np.stack(np.meshgrid(np.arange(width), np.arange(height), [0], indexing="xy"), -1)[:, :, 0]
        kept = fitted(places.astype(np.uint8), (to_height, to_width), "crop")
        assert kept.shape[:2] == (to_height, to_width)
        assert kept[0, 0, :2].tolist() == [left, top], case


def test_16_bit_grey_is_clipped_as_in_both_references(colours: np.ndarray, read: Any, caplog: Any) -> None:
    grey = colours[:, :, 0].astype(np.uint16)
    content = _saved(Image.fromarray(grey), "PNG")
    np.testing.assert_array_equal(read(content).pixels[:, :, 1], grey)
    assert caplog.records == []
    content = _saved(Image.fromarray(grey * 256 + 77), "PNG")
    peers = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(read(content).pixels, peers)
    assert "16-bit grey, in which all values above 255 become white" in caplog.text


@pytest.mark.parametrize(("kind", "mode"), [("GIF", "P"), ("GIF", "L"), ("BMP", "RGB"), ("BMP", "P"), ("BMP", "1")])
def test_gif_and_bmp_files_are_read_as_in_pillow(colours: np.ndarray, read: Any, kind: str, mode: str) -> None:
    content = _saved(Image.fromarray(colours).convert(mode), kind)
    np.testing.assert_array_equal(read(content).pixels, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_the_first_frame_of_an_animated_gif_is_used_with_a_warning(read: Any, caplog: Any) -> None:
    found = read(_animated("GIF")).pixels
    assert (found == (255, 0, 0)).all()
    assert "is animated; its first frame is used" in caplog.text


def test_gif_and_bmp_are_only_for_files() -> None:
    """Pictures without a file are limited to the formats that a browser sends."""
    for kind in ("GIF", "BMP"):
        with pytest.raises(UsageError, match="is not a PNG, JPEG or WebP picture"):
            input_pictures.decoded_pixels(_saved(Image.new("RGB", (4, 4)), kind), "x")


def _png(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _bmp(width: int, height: int) -> bytes:
    """Return a BMP that claims a size and holds no pixels."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def _animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    return _saved(frames[0], kind, save_all=True, append_images=frames[1:])


SOUND = _saved(Image.fromarray(np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)), "PNG")
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a PNG, JPEG, WebP, GIF or BMP picture"),
    "text": (b"not a picture", "is not a PNG, JPEG, WebP, GIF or BMP picture"),
    "another format": (_saved(Image.new("RGB", (4, 4)), "TIFF"), "is not a PNG, JPEG, WebP, GIF or BMP picture"),
    "a GIF bomb": (b"GIF89a" + struct.pack("<HH", 10_000, 10_000) + _saved(Image.new("L", (4, 4)), "GIF")[10:],
                   "10000x10000, more than 89478485 pixels"),
    "a BMP bomb": (_bmp(10_000, 10_000), "10000x10000, more than 89478485 pixels"),
    "a truncated GIF": (_saved(Image.new("L", (64, 64)), "GIF")[:40], "picture"),
    "a truncated BMP": (_bmp(64, 64), "is a broken picture"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "is not a PNG"),
    "truncated": (SOUND[:-30], "is a broken picture"),
    "a flipped bit": (SOUND[:50] + bytes([SOUND[50] ^ 1]) + SOUND[51:], "is a broken picture"),
    "a bomb": (_png(20_000, 20_000), "too many pixels|more than 89478485"),
    "a smaller bomb": (_png(10_000, 10_000), "10000x10000, more than 89478485 pixels"),
    "no width": (_png(0, 4), "picture"),
    "animated PNG": (_animated("PNG"), "is animated; give a single frame"),
    "animated WebP": (_animated("WEBP"), "is animated; give a single frame"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), REFUSED.values(), ids=REFUSED)
def test_content_that_is_not_a_picture_is_refused_in_one_line(content: bytes, words: str, read: Any) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        read(content)
    assert "\n" not in str(caught.value)
    assert "in.png" in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("missing.png", "check the path"), (".", "is not a file"), ("pipe", "is not a file"),
                        ("nul\0", "no file can have this name")):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            read_input(tmp_path / name, "--refine")
    monkeypatch.setattr(input_pictures, "MAX_BYTES", 20)
    (tmp_path / "large").write_bytes(bytes(21))
    with pytest.raises(UsageError, match=r"--refine .*larger than"):
        read_input(tmp_path / "large", "--refine")


def test_the_first_picture_of_a_cameras_jpeg_is_used(read: Any) -> None:
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ((200, 10, 10), (10, 10, 200)))
    found = read(_saved(first, "MPO", save_all=True, append_images=[second])).pixels
    assert found[8, 8, 0] > 180


@pytest.fixture
def latents(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((2, 4, 3, 5), dtype=np.float32)


def test_latents_are_read_from_npy_and_npz(latents: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", latents)
    np.save(tmp_path / "f.npy", np.asfortranarray(latents))
    np.savez(tmp_path / "a.npz", initial=latents * 0, final=latents)
    np.savez_compressed(tmp_path / "c.npz", final=latents)
    for name in ("a.npy", "f.npy", "a.npz", "c.npz"):
        picture = read_input(tmp_path / name)
        np.testing.assert_array_equal(picture.latents, latents)
        assert (picture.pixels, picture.size) == (None, None)


def test_other_arrays_than_latents_are_refused(latents: np.ndarray, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "in.npz"
    whole = io.BytesIO()
    np.save(whole, latents)
    claims = whole.getvalue().replace(b"(2, 4, 3, 5)", b"(2, 4, 3, 9)")
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("final.npy", bytes(1 << 20))
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    monkeypatch.setattr(input_pictures, "MAX_BYTES", 1 << 19)
    for content, words in (
        (whole.getvalue()[:-4], "holds no latents"),
        (claims, "holds no latents"),
        (pickled.getvalue(), "object, not float32"),
        (bomb.getvalue(), "holds more than"),
        (bomb.getvalue()[:-20], "holds no latents"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=words):
            read_input(path)
    for array, words in ((latents.astype(np.float64), "float64, not float32"), (latents[0], "not a picture"),
                         (latents * np.float32(np.nan), "not a picture"), (latents[:0], "not a picture")):  # fmt: skip
        np.savez(path, final=array)
        with pytest.raises(UsageError, match=words):
            read_input(path)
    np.savez(path, other=latents)
    with pytest.raises(UsageError, match=r"final\.npy"):
        read_input(path)


def test_an_array_may_be_a_picture(colours: np.ndarray, latents: np.ndarray) -> None:
    picture = as_input(colours)
    assert (picture.name, len(picture.sha256)) == ("", 64)
    assert as_input(picture) is picture
    assert as_input(colours.copy()).sha256 == picture.sha256 != as_input(colours[::-1]).sha256
    assert as_input(latents).latents is latents
    for wrong in (colours[0], colours.astype(float), latents.astype(np.float16), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(UsageError, match="give uint8"):
            as_input(wrong)


def test_a_picture_is_fitted_to_a_size(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (37, 53, 3), np.uint8)
    np.testing.assert_array_equal(fitted(pixels, (32, 48), "crop"), pixels[2:34, 2:50])
    assert fitted(pixels, (37, 53), "scale") is pixels
    # A white bar in the middle of black: "cover" keeps its width, "scale" narrows it.
    bar = np.zeros((64, 128, 3), np.uint8)
    bar[:, 48:80] = 255
    widths = {way: int((fitted(bar, (64, 64), way)[32, :, 0] > 127).sum()) for way in ("cover", "scale")}
    assert widths == {"cover": 32, "scale": 16}


@settings(deadline=None, max_examples=60)
@given(st.tuples(*[st.integers(1, 70)] * 4), st.sampled_from(["scale", "cover"]))
def test_any_size_is_reached(sides: tuple[int, int, int, int], way: Any) -> None:
    height, width, high, wide = sides
    grey = np.full((height, width, 3), 120, np.uint8)
    found = fitted(grey, (high, wide), way)
    assert found.shape == (high, wide, 3)
    assert found.dtype == np.uint8
    assert (found == 120).all(), "there is no border"


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([SOUND, _animated("WEBP"), _animated("GIF"), _bmp(3, 3) + bytes(36), _png(3, 3)]), st.data())
def test_any_bytes_are_a_picture_or_refused(content: bytes, data: st.DataObject) -> None:
    damaged = bytearray(content[: data.draw(st.integers(0, len(content)))] + data.draw(st.binary(max_size=8)))
    for place in data.draw(st.lists(st.integers(0, max(len(damaged) - 1, 0)), max_size=4)) if damaged else []:
        damaged[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UsageError):
        assert input_pictures.decoded_pixels(bytes(damaged), "x", input_pictures.FILE_FORMATS).ndim == 3
