"""A preset stands for options, says which, and gives way to those beside it."""

from pathlib import Path

import pytest

from sdxl_trt.runtime.cli.generate import main
from sdxl_trt.runtime.cli.options import expand_preset, make_parser
from sdxl_trt.runtime.pipeline import read_settings
from sdxl_trt.runtime.presets import PRESETS, preset_options

DOCS = Path(__file__).parents[3] / "docs" / "caching.md"


@pytest.mark.parametrize("name", PRESETS)
def test_its_options_give_its_settings_and_the_docs_have_them(name: str) -> None:
    arguments = make_parser().parse_args(["a star", *preset_options(name)])
    assert {setting: getattr(arguments, setting) for setting in PRESETS[name]} == PRESETS[name]
    assert f"`--{name}`" in DOCS.read_text(encoding="utf-8")
    assert f"`{' '.join(preset_options(name))}`" in DOCS.read_text(encoding="utf-8")


@pytest.mark.parametrize("argv", [["a star", "--fast", "--steps", "9"], ["a star", "--steps", "9", "--fast"]])
def test_options_beside_it_win_on_either_side(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = make_parser().parse_args(expand_preset("fast", argv))
    assert (arguments.steps, arguments.cache, arguments.prompt) == (9, 2, "a star")
    assert capsys.readouterr().err == "--fast stands for --steps 20 --cache 2\n"


def test_only_one_is_given() -> None:
    with pytest.raises(SystemExit, match="2"):
        make_parser().parse_args(["a star", "--fast", "--fastest"])


def test_a_picture_records_what_it_stood_for(tmp_path: Path) -> None:
    path = tmp_path / "star.png"
    assert main(["a star", "--fast", "--steps", "6", "--seed", "1", "--no-refiner", "-o", str(path)]) == 0
    settings = read_settings(path)
    assert (settings.steps, settings.cache) == (6, 2)
