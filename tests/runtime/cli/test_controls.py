"""trt-generate with --control: the picture, its record, and the picture made again from that."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from sdxl_trt.runtime.cli import repeat
from sdxl_trt.runtime.cli.generate import main
from sdxl_trt.runtime.controls import ControlFact
from sdxl_trt.runtime.pipeline.record import read_settings

SIZE = ["--width", "64", "--height", "64"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("edges.png", "pose.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_picture_is_made_again_from_its_record(
    controlled: Path, folder: Path, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    engines = ["--engines", str(controlled), "--provider", "ort-cpu"]
    asked = ["a star", *engines, *SIZE, "--steps", "2", "--seed", "3", "--no-refiner"]
    both = ["--control", "edges.png:0.5:0:0.5", "--control", "poses=pose.png:-0.25"]
    assert main([*asked, *both, "-o", "first.png"]) == 0
    assert main([*asked, "-o", "without.png"]) == 0
    assert main(["--from", "first.png", *engines, "-o", "again.png"]) == 0
    assert main(["--from", "first.png", *engines, "--control", "none", "-o", "none.png"]) == 0
    pixels = {path.stem: np.asarray(Image.open(path)).tobytes() for path in folder.glob("*.png")}
    assert pixels["again"] == pixels["first"] != pixels["without"] == pixels["none"]
    told = [(fact.name, fact.net, fact.scale, fact.end) for fact in read_settings(folder / "again.png").controls]
    assert told == [("edges.png", "edges", 0.5, 0.5), ("pose.png", "poses", -0.25, 1.0)]
    (folder / "pose.png").write_bytes((folder / "edges.png").read_bytes())
    line = fails(main, ["--from", "first.png", *engines], 2)
    assert "was made with --control 'pose.png', which is not beside it as it was" in line
    capsys.readouterr()
    assert main(["--plan", "--json", *engines, "--control", "edges.png", *SIZE]) == 0
    phases: Any = {phase["name"]: phase["components"] for phase in json.loads(capsys.readouterr().out)["phases"]}
    assert phases["base"] == ["unet", "controlnet"]


def test_what_is_repeated_without_its_controlnet_is_not_in_guess_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "g.png"
    assert main(["a star", *SIZE, "--steps", "1", "--no-refiner", "-o", str(record)]) == 0
    fact = ControlFact(name="edges.png", sha256="0" * 64, net="edges")
    settings = msgspec.structs.replace(read_settings(record), controls=(fact,), control_guess=True)
    monkeypatch.setattr(repeat, "read_settings", lambda _: settings)
    monkeypatch.setattr(repeat, "find_control", lambda fact, _: fact.name)
    for options, guess in (
        ([], True),
        (["--control", "none"], False),
        (["--control", "none", "--control-guess"], True),
    ):
        assert repeat.repeated(["--from", str(record), *options]).control_guess == guess


def test_bad_input_costs_a_line(controlled: Path, folder: Path, fails: Callable[..., str]) -> None:
    asked = ["a star", "--engines", str(controlled), "--provider", "ort-cpu", *SIZE, "--steps", "2"]
    assert "is picture 3, but the bundle has 2 ControlNets" in fails(main, [*asked, *["--control", "pose.png"] * 3], 2)
    assert "--control gone.png: No such file" in fails(main, [*asked, "--control", "gone.png"], 2)
    assert "'pose.png:1:2': give [NAME=]FILE" in fails(main, [*asked, "--control", "pose.png:1:2"], 2)
    line = fails(main, ["a star", "--control", "pose.png"], 3)
    assert line.endswith("export it again with one: export-engines --base SRC --controlnet SRC")
    assert [path.name for path in sorted(folder.iterdir())] == ["edges.png", "pose.png"]
