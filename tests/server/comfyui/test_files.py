"""Pictures by table, never by path: what is not the plain name of an own picture is refused or not found."""

import gc
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from sdxl_trt.server.comfyui import files as files_module
from sdxl_trt.server.comfyui.names import output_name

Json = dict[str, Any]
Fake = Callable[..., tuple[TestClient, Any]]


def _png(colour: tuple[int, ...] = (200, 40, 40), mode: str = "RGB", kind: str = "PNG", **more: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (8, 4), colour).save(buffer, kind, **more)
    return buffer.getvalue()


def _upload(client: TestClient, name: str = "cat.png", data: bytes | None = None, **fields: str) -> Any:
    return client.post("/upload/image", files={"image": (name, _png() if data is None else data)}, data=fields)


BAD = [
    "..", "../cat.png", "..\\cat.png", "%2e%2e%2fcat.png", "%252e%252e%252fcat.png", "cat.png%00", "cat\x00.png",
    "/etc/passwd", "C:\\cat.png", "C:cat.png", "sub/cat.png", "", "a" * 300, "cat.png\r\nX-Evil: 1", "\\\\host\\share",
    "../cat.png [input]", "/etc/passwd [input]", ". [input]/../..", " [input]",
]  # fmt: skip
MISSING = ["con", "cat.png [output]", "cat.png [input] [input]", 'cat".png', "cat'.png", "<script>.png", ".", "~",
           "cat.png.", "CAT.PNG [input]"]  # fmt: skip


@pytest.fixture(scope="module")
def stored(shared_fake: Fake) -> TestClient:
    """Return a client that has stored cat.png."""
    client, _ = shared_fake()
    assert _upload(client).status_code == 200
    return client


@pytest.mark.parametrize(
    ("name", "raw"),
    [(name, raw) for raw in (False, True) for name in BAD if not (raw and any(char in name for char in "\r\n\0 "))],
)
def test_what_is_no_name_is_refused(stored: TestClient, name: str, raw: bool) -> None:
    answer = stored.get(f"/view?filename={name}") if raw else stored.get("/view", params={"filename": name})
    assert answer.status_code == 400
    assert "X-Evil" not in answer.headers
    assert "passwd" not in answer.text


@pytest.mark.parametrize("name", MISSING)
def test_a_strange_name_is_not_found(stored: TestClient, name: str) -> None:
    assert stored.get("/view", params={"filename": "cat.png", "type": "input"}).status_code == 200
    assert stored.get("/view", params={"filename": name}).status_code == 404


@pytest.mark.parametrize(("folder", "status"), [
    ("..", 403), ("a/../..", 403), ("/etc", 403), ("%2e%2e", 400), ("a\\b", 400), ("C:", 400), ("none", 404),
])  # fmt: skip
def test_a_folder_that_lies_outside_is_refused(stored: TestClient, folder: str, status: int) -> None:
    query = {"filename": "cat.png", "subfolder": folder, "type": "input"}
    assert stored.get("/view", params=query).status_code == status


def test_a_planted_link_is_not_followed(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module.tempfile, "tempdir", str(tmp_path))
    client, _ = fake()
    _upload(client)
    (folder,) = tmp_path.glob("trt-serve-*")
    assert folder.stat().st_mode & 0o077 == 0
    (folder / "planted.png").symlink_to("/etc/passwd")
    (folder / "sub").symlink_to("/etc")
    for query in ({"filename": "planted.png"}, {"filename": "passwd", "subfolder": "sub"}):
        for kind in ("input", "output", "temp"):
            assert client.get("/view", params={**query, "type": kind}).status_code == 404
    (stored,) = [path for path in folder.iterdir() if not path.is_symlink()]
    assert client.get("/view", params={"filename": stored.name, "type": "input"}).status_code == 404


def test_another_keys_files_are_not_there(fake: Fake, graph: Json, stranger: dict[str, str]) -> None:
    client, _ = fake()
    _upload(client)
    query = {"filename": "cat.png", "type": "input"}
    assert client.get("/view", params=query).status_code == 200
    assert client.get("/view", params=query, headers=stranger).status_code == 404
    menu = client.get("/object_info/LoadImage", headers=stranger).json()["LoadImage"]["input"]["required"]["image"][0]
    assert menu == []
    graph["10"] = {"class_type": "LoadImage", "inputs": {"image": "cat.png"}}
    graph["5"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["10", 0], "vae": ["4", 2]}}
    answer = client.post("/prompt", json={"prompt": graph}, headers=stranger)
    assert answer.status_code == 400
    assert answer.json()["node_errors"]["10"]["errors"][0]["type"] == "custom_validation_failed"


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "cat.png [input]", "..", "none.png", "C:\\x.png"])
def test_a_graph_names_no_path(stored: TestClient, graph: Json, name: str) -> None:
    graph["10"] = {"class_type": "LoadImage", "inputs": {"image": name}}
    graph["5"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["10", 0], "vae": ["4", 2]}}
    graph["3"]["inputs"]["denoise"] = 0.5
    answer = stored.post("/prompt", json={"prompt": graph})
    if name == "cat.png [input]":  # it is found, and is too small for this bundle
        assert "there is no picture" not in answer.text
        assert "trt-serve-" not in answer.text
    else:
        assert answer.status_code == 400
        assert "there is no picture" in answer.json()["node_errors"]["10"]["errors"][0]["details"]


def test_uploads_are_named_plainly(fake: Fake) -> None:
    client, _ = fake()
    names = [_upload(client, name).json().get("name") for name in (
        "my cat.png", "page.html", ".hidden", 'q"uote.png', "é.jpg", "con", "x" * 200 + ".png",
        "two..dots.png")]  # fmt: skip
    assert names[:6] == ["my_cat.png", "page.html.png", "hidden.png", "q_22uote.png", "_.jpg", "con.png"]
    assert len(names[6]) < 120
    assert names[7] is None
    for name in ("../x.png", "a/b.png", "a\\b.png", "C:x.png", "%2e%2e%2fx.png", "%252e.png"):
        assert _upload(client, name).status_code == 400, name
    for folder in ("..", "/x", "a//../b", "a b", "a/b/c/d/e", "x" * 200):
        assert _upload(client, subfolder=folder).status_code == 400, folder
    told = _upload(client, subfolder="default_upload_folder").json()
    assert told == {"name": "cat.png", "subfolder": "default_upload_folder", "type": "input"}
    query = {"filename": "cat.png", "subfolder": "default_upload_folder", "type": "input"}
    answer = client.get("/view", params=query)
    assert answer.headers["content-disposition"] == 'filename="cat.png"'
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_name_again_is_reused_numbered_or_replaced(fake: Fake) -> None:
    client, _ = fake()
    red, blue = _png((255, 0, 0)), _png((0, 0, 255))
    assert [_upload(client, data=data).json()["name"] for data in (red, red, blue, blue, red)] == [
        "cat.png", "cat.png", "cat_1.png", "cat_1.png", "cat.png"]  # fmt: skip
    assert _upload(client, data=blue, overwrite="true").json()["name"] == "cat.png"
    shown = client.get("/view", params={"filename": "cat.png [input]"}).content
    assert Image.open(io.BytesIO(shown)).getpixel((0, 0)) == (0, 0, 255)


def test_uploads_are_decoded_and_encoded_again(fake: Fake) -> None:
    client, _ = fake()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    turned = _png(kind="JPEG", exif=exif)
    name = _upload(client, "turned.jpg", turned).json()["name"]
    shown = client.get("/view", params={"filename": name, "type": "input"}).content
    with Image.open(io.BytesIO(shown)) as image:
        assert (image.format, image.size, dict(image.getexif())) == ("PNG", (4, 8), {})
    assert b"camera" not in shown
    polyglot = _png() + b"PK\x03\x04<script>"
    name = _upload(client, "poly.png", polyglot).json()["name"]
    assert b"<script>" not in client.get("/view", params={"filename": name, "type": "input"}).content
    clear = _png((1, 2, 3, 4), "RGBA")
    name = _upload(client, "clear.png", clear).json()["name"]
    alpha = client.get("/view", params={"filename": name, "type": "input", "channel": "a"}).content
    assert Image.open(io.BytesIO(alpha)).getpixel((0, 0)) == 4
    for data in (b"<html></html>", b"", clear[:40], b"GIF89a"):
        assert _upload(client, "page.png", data).status_code == 400
    assert _upload(client, type="output").status_code == 400
    assert client.post("/upload/image", files={"image": (None, "text")}).status_code == 400


def test_views_are_made_smaller_or_of_one_channel(fake: Fake) -> None:
    client, _ = fake()
    _upload(client)
    kinds = {"webp;90": "WEBP", "jpeg;1": "JPEG", "jpeg": "JPEG", "webp;9999": "WEBP", "x;y": "WEBP"}
    for wanted, kind in kinds.items():
        answer = client.get("/view", params={"filename": "cat.png", "type": "input", "preview": wanted})
        assert Image.open(io.BytesIO(answer.content)).format == kind
        assert answer.headers["content-type"] == f"image/{kind.lower()}"
    answer = client.get("/view", params={"filename": "cat.png", "type": "input", "channel": "rgb"})
    assert Image.open(io.BytesIO(answer.content)).mode == "RGB"
    for query in ({"channel": "x"}, {"type": "x"}):
        assert client.get("/view", params={"filename": "cat.png", "type": "input", **query}).status_code == 400


def test_a_client_has_a_quota(fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(files_module, "MOST_UPLOADS", 2)
    monkeypatch.setattr(files_module.tempfile, "tempdir", str(tmp_path))
    client, _ = fake()
    for name in ("a.png", "b.png", "c.png"):
        assert _upload(client, name).status_code == 200
    shown = [client.get("/view", params={"filename": name, "type": "input"}).status_code
             for name in ("a.png", "b.png", "c.png")]  # fmt: skip
    assert shown == [404, 200, 200]
    gc.collect()
    (folder,) = tmp_path.glob("trt-serve-*")
    assert len([*folder.iterdir()]) == 2
    monkeypatch.setattr(files_module, "MOST_UPLOADED", 10)
    assert _upload(client, "d.png").status_code == 413


@pytest.mark.parametrize("prefix", ["../../x", "/etc/x", "a/b", "C:\\x", "", "%date%", 'a"b\r\n', "é" * 9, "..", "con"])
def test_names_of_outputs_need_no_escapes(prefix: str) -> None:
    name = output_name(prefix, 3)
    assert name.endswith("_00003_.png")
    assert set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")
    assert ".." not in name
    assert not name.startswith(".")
