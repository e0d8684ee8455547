"""Workflows in EXIF data, where ComfyUI and its custom nodes write them, and photographs without any."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_trt.runtime.images.exif import EDITOR, GRAPH, exif_texts
from sdxl_trt.runtime.images.files import PARAMETERS, WORKFLOW, read_texts

API = json.dumps({"3": {"class_type": "KSampler", "inputs": {"text": "a fox: red, „groß“"}}}, ensure_ascii=False)
PAGE = json.dumps({"nodes": [], "links": []})
DESCRIPTION, MAKE, MODEL, COMMENT, XP_COMMENT, ARTIST = 0x010E, 0x010F, 0x0110, 0x9286, 0x9C9C, 0x013B
EXIF = 0x8769


def _picture(kind: str, main: dict[int, Any], notes: dict[int, Any] | None = None) -> bytes:
    exif = Image.Exif()
    for tag, value in main.items():
        exif[tag] = value
    for tag, value in (notes or {}).items():
        exif.get_ifd(EXIF)[tag] = value
    file = BytesIO()
    Image.new("RGB", (4, 4)).save(file, kind, exif=exif)
    return file.getvalue()


def _comment(text: str, order: str = "utf-16-be") -> bytes:
    return b"UNICODE\0" + text.encode(order)


ASCII_API = json.dumps(json.loads(API))
SAVERS: dict[str, tuple[dict[int, Any], dict[int, Any]]] = {
    "SaveAnimatedWEBP": ({MODEL: f"prompt:{ASCII_API}", MAKE: f"workflow:{PAGE}"}, {}),
    "in capitals": ({DESCRIPTION: f"Workflow:{PAGE}", MAKE: f"Prompt: {ASCII_API}"}, {}),
    "a comment in ASCII": ({DESCRIPTION: f"WORKFLOW:{PAGE}"}, {COMMENT: b"ASCII\0\0\0prompt:" + ASCII_API.encode()}),
    "a comment in UTF-16": ({MAKE: f"workflow: {PAGE}"}, {COMMENT: _comment(f"Prompt:{API}")}),
    "the other byte order": ({MAKE: f"workflow: {PAGE}"}, {COMMENT: _comment(f"Prompt:{API}", "utf-16-le")}),
    "with a BOM": ({MAKE: f"workflow: {PAGE}"}, {COMMENT: _comment(f"Prompt:{API}", "utf-16")}),
    "Windows' comment": ({XP_COMMENT: f"prompt:{API}\0".encode("utf-16-le"), ARTIST: f"workflow:{PAGE}"}, {}),
    "an object of both": ({}, {COMMENT: _comment(json.dumps({"prompt": json.loads(API), "workflow": PAGE}))}),
    "the main directory": ({COMMENT: b"ASCII\0\0\0" + json.dumps({"Prompt": API, "Workflow": PAGE}).encode()}, {}),
}


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize("saver", SAVERS)
def test_workflows_are_found_in_any_tag(saver: str, kind: str, tmp_path: Path) -> None:
    content = _picture(kind, *SAVERS[saver])
    texts = read_texts(content)
    assert json.loads(texts[WORKFLOW]) == json.loads(API)
    assert json.loads(texts["workflow"]) == json.loads(PAGE)
    assert PARAMETERS not in texts
    (tmp_path / "x").write_bytes(content)
    assert read_texts(tmp_path / "x") == texts


def test_utf_8_in_a_tag_is_decoded() -> None:
    assert exif_texts({MODEL: f"prompt:{API}".encode().decode("latin-1")}, {})[GRAPH] == API


@pytest.mark.parametrize(
    "text",
    ["Prompt: a cat", "workflow: {red|blue} fox", "prompt:[1]", "prompt:", "{}", '{"prompt": 7}', '{"prompt": "a cat"}',
     "prompt:" + "[" * 9999, 'prompt:{"a":' + "[" * 99_999],
)  # fmt: skip
def test_text_that_is_not_a_graph_is_ignored(text: str) -> None:
    assert exif_texts({DESCRIPTION: text, MAKE: 7, MODEL: ("x", 2)}, {COMMENT: _comment(text)}).keys() <= {PARAMETERS}


def test_the_first_graph_counts_and_a_long_one_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exif_texts({MAKE: 'prompt:{"1": 1}', MODEL: 'prompt:{"2": 2}'}, {})[GRAPH] == '{"1": 1}'
    monkeypatch.setattr("sdxl_trt.runtime.images.exif.MAX_TEXT", 20)
    assert exif_texts({MAKE: f"workflow:{PAGE}", MODEL: 'prompt:{"2": 2}'}, {}) == {GRAPH: '{"2": 2}'}


def test_a_png_has_its_own_texts_or_those_of_its_exif_data(tmp_path: Path) -> None:
    assert read_texts(_picture("PNG", {MODEL: f"prompt:{ASCII_API}"})) == {GRAPH: ASCII_API}
    assert EDITOR not in read_texts(_picture("PNG", {}))
