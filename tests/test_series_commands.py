"""Series and repeats through the command: sweeps, contact sheets, prompt files, repeated pictures."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_trt.runtime.cli.generate import main as trt_generate

FAST = ["--steps", "4", "--handoff", "0.5", "--width", "32", "--height", "32"]


@pytest.fixture
def bundle(pairs: Callable[[str], Any], tmp_path: Path) -> Path:
    """Return a bundle that the test may damage."""
    return Path(shutil.copytree(pairs("outline").bundle, tmp_path / "bundle"))


@pytest.mark.slow
def test_a_picture_is_repeated_from_its_file(bundle: Path, tmp_path: Path, capsys: Any) -> None:
    first, again, other = (tmp_path / name for name in ("first.png", "again.webp", "other.png"))
    odd = ["--negative", "", "--sampler", "dpmpp_sde", "--schedule", "karras", "--guidance-interval", "0:0.5",
           "--aesthetic-score", "7", "--refiner-guidance", "3", "--seed", "18446744073709551615"]  # fmt: skip
    assert trt_generate(["a red fox", "--engines", str(bundle), "-o", str(first), *FAST, *odd]) == 0
    common = ["--from", str(first), "--engines", str(bundle)]
    assert trt_generate([*common, "-o", str(again)]) == 0
    assert trt_generate([*common, "-o", str(other), "--aesthetic-score", "3"]) == 0
    pixels = []
    for path in (first, again, other):
        with Image.open(path) as image:
            pixels.append(np.asarray(image.convert("RGB")))
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])
    capsys.readouterr()


@pytest.mark.slow
def test_a_picture_with_compat_comfyui_is_repeated(bundle: Path, tmp_path: Path) -> None:
    way = ["--compat", "comfyui", "--sampler", "euler_ancestral", "--schedule", "karras", "--base-end-step", "3",
           "--refiner-start-step", "2", "--refiner-add-noise", "--crop", "4,8", "--clip-skip", "-1",
           "-n", "2"]  # fmt: skip
    size = ["--steps", "4", "--width", "32", "--height", "32"]
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    assert trt_generate(["a (red:1.3) fox", "--engines", str(bundle), "-o", str(first), *size, *way]) == 0
    assert trt_generate(["--from", str(tmp_path / "first-1.png"), "--engines", str(bundle), "-o", str(again)]) == 0
    for number in range(2):
        assert (tmp_path / f"first-{number}.png").read_bytes() == (tmp_path / f"again-{number}.png").read_bytes()


@pytest.mark.slow
def test_a_sweep_writes_its_cells_and_their_sheet(bundle: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "sheet.jpg"
    arguments = ["a red fox", "--engines", str(bundle), "-o", str(out), "--json", *FAST]
    assert trt_generate([*arguments, "--sweep", "aesthetic-score=4,6", "--sweep", "handoff-step=1,2,none"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sorted(path.name for path in tmp_path.glob("sheet*")) == [*(f"sheet-{k}.jpg" for k in range(6)), "sheet.jpg"]
    assert (report["sheet"], report["handoff"]) == (str(out), None)
    assert {image["seed"] for image in report["images"]} == {report["images"][0]["seed"]}
    assert report["images"][5]["sweep"] == {"aesthetic-score": 6.0, "handoff-step": None}
    assert (len(report["timings"]["base"]["steps"]), len(report["timings"]["refiner"]["steps"])) == (4, 2 * (3 + 2))


@pytest.mark.slow
def test_a_sheet_is_repeated_from_its_file(bundle: Path, tmp_path: Path, capsys: Any) -> None:
    common = ["--engines", str(bundle), "--json"]
    first = ["a red fox", "-o", str(tmp_path / "first.png"), *FAST, "--refiner-guidance", "3", "--handoff", "0.5"]
    assert trt_generate([*common, *first, "--sweep", "guidance=3,7", "--sweep", "steps=4,6"]) == 0
    assert trt_generate([*common, "--from", str(tmp_path / "first.png"), "-o", str(tmp_path / "again.png")]) == 0
    for name in ("", *(f"-{k}" for k in range(4))):
        assert (tmp_path / f"first{name}.png").read_bytes() == (tmp_path / f"again{name}.png").read_bytes()
    assert "warning" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_workflow_picture_is_repeated_and_another_bundle_is_warned_about(
    bundle: Path, tmp_path: Path, capsys: Any
) -> None:
    way = ["--compat", "comfyui", "--steps", "2", "--width", "32", "--height", "32", "--no-refiner", "--engines"]
    made, run, again, other = (str(tmp_path / name) for name in ("made.png", "run.webp", "again.webp", "other.png"))
    assert trt_generate(["a (red:1.3) fox", *way, str(bundle), "-o", made]) == 0
    assert trt_generate(["--workflow", made, "--engines", str(bundle), "--guidance-rescale", "0.5", "-o", run]) == 0
    assert trt_generate(["--from", run, "--engines", str(bundle), "-o", again]) == 0
    assert Path(run).read_bytes() == Path(again).read_bytes()
    assert str(tmp_path).encode() not in Path(made).read_bytes() + Path(run).read_bytes()
    assert "another bundle" not in capsys.readouterr().err
    manifest = (bundle / "manifest.json").read_text()
    digest = json.loads(manifest)["components"]["text_encoder_2"]["weights"]["sha256"]
    weights = bundle / "text_encoder_2" / "weights.data"
    weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    (bundle / "manifest.json").write_text(manifest.replace(digest, hashlib.sha256(weights.read_bytes()).hexdigest()))
    assert trt_generate(["--from", made, "--engines", str(bundle), "-o", other]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(said) == 1
    assert "made with another bundle, base (" in said[0]


@pytest.mark.slow
def test_prompts_of_a_file_are_one_run(bundle: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "prompts.txt").write_text("# two\na red fox\n\na blue star\n", encoding="utf-8")
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--engines", str(bundle), "--residency", "swap"]
    assert trt_generate([*arguments, "-o", str(tmp_path / "x.png"), "-n", "2", "--seed", "7", "--json", *FAST]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(image["prompt"], image["seed"]) for image in report["images"]] == [
        ("a red fox", 7), ("a red fox", 8), ("a blue star", 7), ("a blue star", 8),
    ]  # fmt: skip
    assert [Path(image["path"]).name for image in report["images"]] == [f"x-{k}.png" for k in range(4)]
    components = [engine["component"] for engine in report["engines"]]
    assert len(components) == len(set(components))


@pytest.mark.slow
def test_no_metadata_works_for_every_format(bundle: Path, tmp_path: Path, fails: Any) -> None:
    for kind, ending in (("png", "png"), ("jpeg", "jpg"), ("webp", "webp")):
        path = tmp_path / f"x.{ending}"
        arguments = ["fox", "--engines", str(bundle), "-o", str(path), "--format", kind, "--no-metadata", *FAST]
        assert trt_generate(arguments) == 0
        assert b"fox" not in path.read_bytes()
        assert "carries no settings" in fails(trt_generate, ["--from", str(path)], 2)


def test_contradictory_series_options_are_refused(tmp_path: Path, fails: Any) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox")
    for arguments, message in (
        (["fox", "--prompts", str(prompts)], "state the same thing"),
        (["--prompts", str(prompts), "--sweep", "seed=1,2"], "give one of them"),
        (["fox", "--sweep", "seed=1,2", "-n", "2"], "leave -n out"),
        (["fox", "--sweep", "seed=1,2", "--save-latents", str(tmp_path / "x.npz")], "leave --sweep"),
        (["fox", "--sweep", "handoff=0.5,2"], "--handoff 2"),
        (["fox", "-o", str(tmp_path / "x.png"), "--format", "webp"], "ends in .webp"),
        (["--from", str(prompts)], "not a PNG, JPEG or WebP"),
        (["--from", str(prompts), "--workflow", str(prompts)], "not a PNG, JPEG or WebP"),
    ):
        assert message in fails(trt_generate, arguments, 2)
    assert list(tmp_path.iterdir()) == [prompts]
