"""Picture files: written whole or not at all, their texts read back, and nothing in them trusted."""

import contextlib
import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from sdxl_trt.engines.errors import ResourceError, UsageError
from sdxl_trt.runtime.images.files import PARAMETERS, SETTINGS, WORKFLOW, read_texts, save_image


@pytest.fixture
def image(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (12, 20, 3), np.uint8))


@pytest.mark.parametrize("text", ["{}", '{"prompt": "a red fox"}', "Füchse", "红狐狸 🦊", "line\nline", ""])
def test_a_png_holds_its_pixels_and_texts(tmp_path: Path, image: Image.Image, text: str) -> None:
    save_image(image, tmp_path / "out.png", {SETTINGS: text, PARAMETERS: "x"})
    with Image.open(tmp_path / "out.png", formats=["PNG"]) as read:
        read.load()
        assert read.text == {SETTINGS: text, PARAMETERS: "x"}
        np.testing.assert_array_equal(np.asarray(read), np.asarray(image))


@pytest.mark.parametrize(("ending", "magic"), [("jpg", b"\xff\xd8\xff"), ("JPEG", b"\xff\xd8\xff"), ("webp", b"RIFF")])
def test_exif_holds_the_texts_where_other_programs_look(
    tmp_path: Path, image: Image.Image, ending: str, magic: bytes
) -> None:
    path = tmp_path / f"out.{ending}"
    texts = {PARAMETERS: "红狐狸 🦊\nSteps: 1", SETTINGS: '{"prompt": "x"}', WORKFLOW: '{"1": {}}'}
    save_image(image, path, texts)
    assert path.read_bytes().startswith(magic)
    assert read_texts(path) == texts
    with Image.open(path) as read:
        comment = read.getexif().get_ifd(0x8769)[0x9286]
        assert read.getexif()[0x0110] == 'prompt:{"1": {}}'
        if ending == "webp":
            np.testing.assert_array_equal(np.asarray(read), np.asarray(image))
    assert comment == b"UNICODE\0" + texts[PARAMETERS].encode("utf-16-be")
    save_image(image, path, {})
    assert read_texts(path) == {}
    assert b"sdxl-trt" not in path.read_bytes()


def test_texts_too_long_for_exif_are_left_out_with_a_warning(
    tmp_path: Path, image: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    save_image(image, tmp_path / "out.jpg", {PARAMETERS: "x" * 40_000, SETTINGS: "{}"})
    assert "too long for EXIF" in caplog.text
    assert read_texts(tmp_path / "out.jpg") == {}


def test_another_extension_is_refused(tmp_path: Path, image: Image.Image) -> None:
    with pytest.raises(UsageError, match=r"ends in \.png, \.jpg, \.jpeg, \.webp"):
        save_image(image, tmp_path / "out.gif", {})
    assert list(tmp_path.iterdir()) == []


def _bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text(SETTINGS, "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    return _png(info)


def _png(info: PngImagePlugin.PngInfo | None = None) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a PNG"), (b"GIF89a" + bytes(100), "is not a PNG"), (b"\x89PNG\r\n\x1a\n" + bytes(40), "picture"),
        (_bomb(), "broken picture"), (_png()[:40], "picture"), (b"\xff\xd8\xff\xe1\xff\xff" + bytes(9), "picture"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_an_intact_picture_is_a_usage_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_texts(tmp_path / "x.png")


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_a_damaged_picture_is_read_or_refused(tmp_path: Path, image: Image.Image, ending: str, data: Any) -> None:
    path = tmp_path / f"x.{ending}"
    if not path.exists():
        save_image(image, path, {PARAMETERS: "p", SETTINGS: "{}"})
        (tmp_path / "intact").write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "intact").read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(UsageError):
        assert all(isinstance(text, str) for text in read_texts(path).values())


def test_a_full_disk_keeps_the_old_picture(tmp_path: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "out.png").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError):
        save_image(image, tmp_path / "out.png", {})
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert (tmp_path / "out.png").read_bytes() == b"old"


def test_a_missing_folder_is_a_usage_error(tmp_path: Path, image: Image.Image) -> None:
    with pytest.raises(UsageError, match="check the path"):
        save_image(image, tmp_path / "no" / "out.png", {})
