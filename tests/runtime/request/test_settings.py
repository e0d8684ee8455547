"""One home for a setting: what is declared in Request is found in the parser, the ranges, the record and the schema."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

import sdxl_trt
from sdxl_trt.engines import UsageError
from sdxl_trt.runtime.cli.options import make_parser, stated_settings
from sdxl_trt.runtime.diffusion import PREDICTIONS
from sdxl_trt.runtime.request import Request, check_settings, settings_of

ROOT = Path(sdxl_trt.__file__).parent.parent
SETTINGS = settings_of(Request)
DUMMY = """
    dummy: int = setting(
        7, help="a dummy", unit="dummies", low=0, high=9, group=_DENOISING, metavar="D", sweep="whole numbers"
    )
"""


def test_a_command_line_without_options_is_a_request_without_settings() -> None:
    stated = stated_settings(make_parser().parse_args([]))
    assert Request(**stated) == Request()
    assert all(each.help for each in SETTINGS.values() if each.group)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("seed", -1, "--seed -1: choose 0 to 18446744073709551615"),
        ("count", 0, "-n 0: choose 1 to 10000"),
        ("guidance", float("nan"), "--guidance nan: give a finite number"),
        ("guidance_rescale", 1.5, "--guidance-rescale 1.5: choose 0 to 1"),
        ("guidance_interval", (0.5, 1.5), "--guidance-interval 1.5: give two fractions"),
        ("handoff", 1.0, "--handoff 1.0: choose a fraction between 0 and 1"),
        ("handoff_sigma", 0.0, "--handoff-sigma 0.0: give a positive number"),
        ("strength", 0.0, "--strength 0.0: choose above 0"),
        ("crop", (0, 1 << 21), "--crop 2097152: choose 0 to 1048576"),
        ("compat", "a1111", "--compat 'a1111' is unknown; choose one of: diffusers, comfyui"),
        ("base_end_step", -1, "--base-end-step -1: steps count from 0"),
        ("refiner_seed", -1, "--seed -1: choose 0 to"),
    ],
)
def test_what_is_outside_a_declared_range_is_one_line(name: str, value: Any, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_settings(Request(**{name: value}))
    assert str(caught.value).startswith(says)


def test_choices_that_are_stated_twice_agree() -> None:
    """--help must not wait for numpy, which the denoiser imports."""
    assert SETTINGS["prediction_type"].choices == ("auto", *PREDICTIONS)


def _lists(source: str) -> Iterator[list[str]]:
    """Yield every literal list, tuple or set of three or more texts that all are names of settings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.List | ast.Tuple | ast.Set) and len(node.elts) >= 3:
            texts = [item.value for item in node.elts if isinstance(item, ast.Constant)]
            names = [text.replace("-", "_") for text in texts if isinstance(text, str)]
            if len(names) == len(node.elts) and set(names) <= set(SETTINGS):
                yield names


def test_no_list_of_settings_is_kept_by_hand() -> None:
    paths = [path for part in ("engines", "runtime", "export") for path in (ROOT / part).rglob("*.py")]
    assert len(paths) > 180
    assert {path.name: found for path in paths if (found := [*_lists(path.read_text(encoding="utf-8"))])} == {}
    assert [*_lists('OURS = ("seed", "steps", "handoff-step")')] == [["seed", "steps", "handoff_step"]]


@pytest.fixture(scope="module")
def dummy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs trt-generate with one more setting, declared in one place of a copy."""
    site = tmp_path_factory.mktemp("dummy")
    for part in ("sdxl_trt", "engines", "runtime"):
        target = site / "sdxl_trt" / (part if part != "sdxl_trt" else "")
        shutil.copytree(ROOT / part, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    (site / "sdxl_trt" / "mini").symlink_to(ROOT / "mini")
    path = site / "sdxl_trt" / "runtime" / "request" / "request.py"
    text = path.read_text(encoding="utf-8")
    mark = "\n    # What only a workflow states."
    assert text.count(mark) == 1
    path.write_text(text.replace(mark, DUMMY + mark), encoding="utf-8")

    def run(*arguments: str, folder: Path = site) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sdxl_trt.runtime.cli", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    return run


Dummy = Callable[..., subprocess.CompletedProcess[str]]


def test_a_new_setting_is_an_option_with_a_range_and_in_the_schema(dummy: Dummy) -> None:
    assert "--dummy D" in dummy("--help").stdout
    assert dummy("a", "--dummy", "12").stderr == "error: --dummy 12: choose 0 to 9\n"
    schema = json.loads(dummy("--schema").stdout)["$defs"]["Request"]["properties"]["dummy"]
    assert schema == {"description": "a dummy", "x-unit": "dummies", "type": "integer", "minimum": 0, "maximum": 9,
                      "default": 7}  # fmt: skip


@pytest.mark.slow
def test_a_new_setting_is_in_the_record_and_repeated_from_it(dummy: Dummy, tmp_path: Path) -> None:
    small = ("--steps", "2", "--width", "64", "--height", "64", "--seed", "1")
    assert dummy("a star", *small, "--dummy", "5", "-o", "first.png", folder=tmp_path).returncode == 0
    assert dummy("--from", "first.png", "-o", "again.png", folder=tmp_path).returncode == 0
    assert dummy("a star", *small, "--sweep", "dummy=1,7", "-o", "sheet.png", folder=tmp_path).returncode == 0
    for name, kept in (("first", 5), ("again", 5), ("sheet-0", 1), ("sheet-1", None)):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert json.loads(picture.info["sdxl-trt"]).get("dummy") == kept, name


def test_the_schema_takes_what_the_command_takes(capsys: pytest.CaptureFixture[str]) -> None:
    from sdxl_trt.runtime.cli.generate import main

    assert main(["--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)["$defs"]["Request"]
    # What a file holds is no value of JSON; a ControlNet's picture is one too, and its type is text until it is needed.
    files = {name for name, each in SETTINGS.items() if each.is_file or isinstance(each.type, str)} - {"refine"}
    options = {name for name, each in SETTINGS.items() if each.group} | {"prompt"}
    assert schema["properties"].keys() == options - files
    assert schema["additionalProperties"] is False
    usual = {name: each.default for name, each in SETTINGS.items() if name in schema["properties"]}
    assert {name: each["default"] for name, each in schema["properties"].items()} == msgspec.to_builtins(
        {name: list(value) if isinstance(value, tuple) else value for name, value in usual.items()}
    )
