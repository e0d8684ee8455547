"""export-engines for 8 bits from a user's view: what is refused, at once and in one line, and what a dry run tells."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.export.cli.export import main

Fails = Callable[..., str]


@pytest.fixture
def sources(pairs: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options that name a small pair; nothing may be traced."""
    monkeypatch.setattr("sdxl_trt.export.exporter.convert_component", lambda name, *_, **__: pytest.fail(name))
    pair = pairs("outline")
    return ["--base", str(pair.base), "--refiner", str(pair.refiner)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--calibration prompts.txt", "add --int8, --fp8 or --vae-precision int8"),
        ("--fp16 --exclude-layers up_blocks.*", "add --int8, --fp8 or --vae-precision int8"),
        ("--int8 --calibration missing.txt", "missing.txt: No such file"),
        ("--int8 --calibration missing.npz", "missing.npz: No such file"),
        ("--int8 --calibration .", "Is a directory|Permission"),
        ("--int8 --calibration empty.txt", "has no prompt; write one prompt per line"),
        ("--int8 --calibration latin.txt", "is not UTF-8 text"),
        ("--int8 --calibration many.txt", "1001 prompts; give 1000 at most"),
        ("--int8 --calibration-size 63", "give 64 to 4096 pixels"),
        ("--int8 --calibration-size 4097", "give 64 to 4096 pixels"),
        ("--int8 --calibration-size large", "expected a number of pixels"),
        ("--int8 --calibration-steps 24", "expected the steps of the base and of the refiner, for example 24:6"),
        ("--int8 --calibration-steps 0:1", "at least one step"),
        ("--int8 --calibration-steps 1:1001", "1000 at most"),
        ("--int8 --min-psnr nan", "give decibels above 0"),
        ("--int8 --min-psnr -3", "give decibels above 0"),
        ("--int8 --save-calibration ranges", "write ranges.npz"),
        ("--int8 --save-calibration missing/ranges.npz", "in a folder that does not exist"),
        ("--int8 --quantize-report missing/report.json", "in a folder that does not exist"),
        ("--int8 --quantize-report .", "is a folder"),
        ("--int8 --calibration old.npz --save-calibration new.npz", "nothing is measured"),
        ("--int8 --calibration old.npz --calibration-size 512", "prompts, size and steps have no effect"),
        ("--int8 --exclude-layers up_block.2.*", "no layer of unet or refiner_unet has such a name"),
        ("--int8 --exclude-layers *", "nothing of unet would compute in 8 bits"),
        ("--int8 --components unet", "takes text_encoder, text_encoder_2 too"),
        ("--int8 --components text_encoder --quantize-report report.json", "no component of this export is measured"),
        ("--bf16 --vae-precision int8", "which has no bf16; export with --fp16"),
        ("--int8 --controlnet controlnet", "without a ControlNet; export with --fp16"),
        ("--vae-precision int8 --controlnet controlnet", "without a ControlNet; export with --fp16"),
        ("--int8 --fp8", "not allowed with argument"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_written(
    options: str, words: str, sources: list[str], fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red fox\n")
    Path("empty.txt").write_text("\ufeff\n  \n")
    Path("latin.txt").write_bytes("ein Füchslein".encode("latin-1"))
    Path("many.txt").write_text("a red fox\n" * 1001)
    np.savez("old.npz", nothing=np.zeros(1))
    before = sorted(Path().iterdir())
    line = fails(main, [*sources, "--out", "out", *options.split()], 2)
    assert re.search(words, line), line
    assert sorted(path for path in Path().iterdir() if path.suffix != ".lock") == before


def test_a_file_inside_the_bundle_would_be_lost_with_it(sources: list[str], fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    inside = tmp_path / "out" / "ranges.npz"
    options = ["--int8", "--out", str(tmp_path / "out"), "--save-calibration", str(inside), "--dry-run"]
    assert "lies in --out, which the export replaces" in fails(main, [*sources, *options], 2)


def test_optimums_layout_has_no_place_for_two_graphs(sources: list[str], fails: Fails, tmp_path: Path) -> None:
    line = fails(main, [*sources, "--int8", "--layout", "optimum", "--out", str(tmp_path / "out")], 3)
    assert "unet would be int8" in line
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("damage", ["other model", "nan", "truncated"])
def test_a_file_of_ranges_that_does_not_fit_leaves_everything_as_it_was(
    damage: str, sources: list[str], eight_bit_bundle: Path, fails: Fails, tmp_path: Path
) -> None:
    path = tmp_path / "ranges.npz"
    with np.load(eight_bit_bundle.parent / "ranges.npz") as content:
        arrays = {name: content[name] for name in content.files}
    if damage == "nan":
        arrays["unet/spans"][3, 0] = np.nan
    if damage == "other model":
        arrays["unet/digest"] = arrays["refiner_unet/digest"]
    np.savez(path, **arrays)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    options = ["--int8", "--out", str(tmp_path / "out"), "--calibration", str(path)]
    line = fails(main, [*sources, *options], 2 if damage == "other model" else 4)
    assert f"--calibration {path}" in line
    assert {each for each in tmp_path.iterdir() if each.suffix != ".lock"} == {path}


def test_a_dry_run_tells_what_measuring_takes(sources: list[str], tmp_path: Path, capsys: Any) -> None:
    """An 8-bit component is first written in floating point, and run."""
    needs, precisions = {}, {}
    for option in ("--fp16", "--int8", "--fp8"):
        arguments = [*sources, option, "--out", str(tmp_path / "out"), "--dry-run", "--json"]
        assert main(arguments) == 0
        told = json.loads(capsys.readouterr().out)
        needs[option] = told["needs"]
        precisions[option] = {name: (part["precision"], part["bytes"]) for name, part in told["components"].items()}
    assert list(tmp_path.iterdir()) == []
    for option, name in (("--int8", "int8"), ("--fp8", "fp8")):
        changed = {each for each, part in precisions[option].items() if part != precisions["--fp16"][each]}
        assert changed == {"unet", "refiner_unet"}
        unets = [precisions["--fp16"][each][1] for each in changed]
        assert all(precisions[option][each] == (name, precisions["--fp16"][each][1] // 2) for each in changed)
        assert needs[option]["disk"] == needs["--fp16"]["disk"] + sum(unets) // 2
        assert needs[option]["memory"] >= needs["--fp16"]["memory"]
