"""The examples work, and are short."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_trt import open_bundle

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMPT = "a white triangle on a purple background"


def _example(name: str, **settings: Any) -> Callable[..., None]:
    """Return an example's function by "file.function", with some of the file's constants replaced."""
    file, function = name.split(".")
    found: Callable[..., None] = runpy.run_path(str(EXAMPLES / f"{file}.py"))[function]
    found.__globals__.update(settings)
    return found


def _colours(path: Path) -> int:
    with Image.open(path) as picture:
        return len(picture.convert("RGB").getcolors(1 << 24) or ())


def test_each_example_is_short() -> None:
    lines = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert lines.keys() == {"export_and_run", "gallery", "handoff_sweep", "image_to_image", "text_to_image"}
    assert {name: count for name, count in lines.items() if count > 40} == {}


def test_text_to_image(tmp_path: Path) -> None:
    _example("text_to_image.draw")(PROMPT, tmp_path / "out.png")
    assert _colours(tmp_path / "out.png") > 50


def test_image_to_image(tmp_path: Path) -> None:
    change = _example("image_to_image.change")
    with open_bundle() as pipeline:
        change(pipeline, None, PROMPT, tmp_path / "first.png", strength=0.3)
        change(pipeline, tmp_path / "first.png", PROMPT, tmp_path / "second.png")
    assert _colours(tmp_path / "second.png") > 50
    assert (tmp_path / "first.png").read_bytes() != (tmp_path / "second.png").read_bytes()


def test_handoff_sweep(tmp_path: Path) -> None:
    _example("handoff_sweep.sweep", HANDOFFS=(0.5, None))(PROMPT, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.width > 2 * 256


def test_gallery(tmp_path: Path) -> None:
    _example("gallery.draw", PROMPTS=(PROMPT, PROMPT))(tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.width > 2 * 256


@pytest.mark.slow
@pytest.mark.usefixtures("converted_once")
def test_export_and_run(tmp_path: Path) -> None:
    _example("export_and_run.export_and_run")("mini", "mini", tmp_path / "bundle", PROMPT, tmp_path / "out.png")
    assert (tmp_path / "bundle" / "manifest.json").is_file()
    assert _colours(tmp_path / "out.png") > 50
