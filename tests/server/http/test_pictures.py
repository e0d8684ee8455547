"""Pictures of clients: one frame of three formats, within the cap, or a 400."""

import base64
import io
import struct
import zlib

import pytest
from PIL import Image

from sdxl_trt.server.http import ApiError, from_base64, read_picture
from sdxl_trt.server.options import Options

OPTIONS = Options(max_pixels=64 * 64, max_body=4096)


def file_of(form: str, size: tuple[int, int] = (8, 6), **settings: object) -> bytes:
    Image.new("RGB", size, (200, 10, 10)).save(buffer := io.BytesIO(), form, **settings)
    return buffer.getvalue()


def frames(form: str) -> bytes:
    return file_of(form, save_all=True, append_images=[Image.new("RGB", (8, 6), (0, 0, 255))])


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_one_frame_of_three_formats_is_read(form: str) -> None:
    picture = read_picture(file_of(form), OPTIONS, "image")
    assert picture.size == (8, 6)
    assert picture.convert("RGB").getpixel((3, 3))[0] > 150  # type: ignore[index]


def test_a_photo_with_a_preview_behind_it_is_its_first_frame() -> None:
    assert read_picture(frames("MPO"), OPTIONS, "image").convert("RGB").getpixel((3, 3))[0] > 150  # type: ignore[index]


BOMB = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * (80 << 20), 9))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "no PNG"),
        (file_of("GIF"), "no PNG"),
        (file_of("BMP"), "no PNG"),
        (file_of("TIFF"), "no PNG"),
        (png_of(65535, 65535), "pixels"),
        (png_of(10000, 10000), "pixels"),
        (file_of("PNG", (65, 64)), "65x64"),
        (frames("PNG"), "animated"),
        (frames("WEBP"), "animated"),
        (png_of(8, 8), "damaged"),
        (file_of("JPEG", (64, 64))[:-200], "no PNG|damaged"),
        (file_of("WEBP", (64, 64))[:-20], "no PNG|damaged"),
        (png_of(8, 8, BOMB), "no PNG|damaged"),
    ],
)
def test_other_files_are_refused(data: bytes, says: str) -> None:
    with pytest.raises(ApiError, match=says) as refused:
        read_picture(data, OPTIONS, "image")
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, "invalid_image", "image")


def test_a_picture_at_the_cap_is_read() -> None:
    assert read_picture(file_of("PNG", (64, 64)), OPTIONS, "image").size == (64, 64)


def test_base64_is_read_with_a_data_url_and_line_ends() -> None:
    data = bytes(range(200))
    text = base64.encodebytes(data).decode()
    for head in ("", "data:image/png;base64,", "data:image/webp;base64,"):
        assert from_base64(head + text, OPTIONS, "init_images") == data


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("data:text/html;base64,AAAA", 400), ("http://127.0.0.1/x.png", 400), ("file:///etc/passwd", 400),
        ("AAAAA", 400), ("AA!A", 400), ("é", 400), ("A" * 5500, 413),
    ],
)  # fmt: skip
def test_what_is_no_base64_of_ours_is_refused(text: str, status: int) -> None:
    with pytest.raises(ApiError) as refused:
        from_base64(text, OPTIONS, "init_images")
    assert (refused.value.status, refused.value.param) == (status, "init_images")
    assert "passwd" not in refused.value.message
