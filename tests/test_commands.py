"""The commands from the user's side: results, one-line errors, exit codes, no partial files."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_trt.export.cli.export import main as export_engines
from sdxl_trt.runtime.cli.generate import main as trt_generate

FAST = ["--steps", "4", "--handoff", "0.5", "--width", "32", "--height", "32"]


@pytest.fixture
def bundle(pairs: Callable[[str], Any], tmp_path: Path) -> Path:
    """Return a bundle that the test may damage."""
    return Path(shutil.copytree(pairs("outline").bundle, tmp_path / "bundle"))


@pytest.fixture
def models(pairs: Callable[[str], Any], tmp_path: Path) -> Path:
    """Return a folder with base/ and refiner/ that the test may damage."""
    pair = pairs("outline")
    for stage in (pair.base, pair.refiner):
        shutil.copytree(stage, tmp_path / "models" / stage.name)
    return tmp_path / "models"


@pytest.mark.slow
def test_generate_writes_pictures_latents_and_json(bundle: Path, tmp_path: Path, capsys: Any) -> None:
    out, latents = tmp_path / "fox.png", tmp_path / "fox.npz"
    arguments = ["a red fox", "--engines", str(bundle), "-o", str(out), "-n", "2", "--seed", "7", "--json", *FAST]
    assert trt_generate([*arguments, "--save-latents", str(latents)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [image["seed"] for image in report["images"]] == [7, 8]
    assert [Path(image["path"]).name for image in report["images"]] == ["fox-0.png", "fox-1.png"]
    with Image.open(tmp_path / "fox-1.png") as image:
        assert image.size == (32, 32)
        assert json.loads(image.text["sdxl-trt"])["seed"] == 8
    assert report["handoff"]["step"] == 2
    assert {engine["component"] for engine in report["engines"]} >= {"unet", "refiner_unet", "vae_decoder"}
    with np.load(latents) as arrays:
        assert {name: arrays[name].dtype for name in arrays} == dict.fromkeys(
            ("initial", "handoff", "final"), np.float32
        )
        assert arrays["initial"].shape == (2, 4, 16, 16)


@pytest.mark.slow
def test_injected_latents_give_the_same_result_as_their_seed(bundle: Path, tmp_path: Path) -> None:
    first, second, noise = tmp_path / "a.npz", tmp_path / "b.npz", tmp_path / "noise.npy"
    common = ["a red fox", "--engines", str(bundle), *FAST]
    assert trt_generate([*common, "--seed", "3", "-o", str(tmp_path / "a.png"), "--save-latents", str(first)]) == 0
    np.save(noise, np.load(first)["initial"])
    again = ["-o", str(tmp_path / "b.png"), "--latents", str(noise), "--save-latents", str(second)]
    assert trt_generate([*common, *again]) == 0
    np.testing.assert_array_equal(np.load(first)["final"], np.load(second)["final"])


@pytest.mark.slow
def test_without_refiner_there_is_no_handoff(bundle: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = [
        "a fox",
        "--engines",
        str(bundle),
        "--no-refiner",
        "--steps",
        "2",
        "--json",
        "-o",
        str(tmp_path / "x.png"),
    ]
    assert trt_generate(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["handoff"] is None
    assert "refiner_unet" not in {engine["component"] for engine in report["engines"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--width", "50"], 2, "try 48 or 64"),
        (["--width", "16", "--height", "-8"], 2, "--height -8"),
        (["--handoff", "1.2"], 2, "between 0 and 1"),
        (["--handoff", "0"], 2, "between 0 and 1"),
        (["--handoff", "nan"], 2, "between 0 and 1"),
        (["--handoff", "high"], 2, "--handoff"),
        (["--handoff", "0.999"], 2, "no step"),
        (["--handoff-step", "30"], 2, "choose 1 to 29"),
        (["--handoff-step", "5", "--handoff", "0.8"], 2, "not allowed with"),
        (["--sampler", "euler_b"], 2, "is unknown; choose"),
        (["--steps", "0"], 2, "--steps 0"),
        (["--seed", "-1"], 2, "--seed -1"),
        (["--guidance", "inf"], 2, "--guidance inf"),
        (["-n", "0"], 2, "choose 1 to 10000"),
        (["-o", "missing/fox.png"], 2, "existing folder"),
        (["-o", "fox.gif"], 2, "ends in .png"),
        (["--latents", "missing.npy"], 2, "missing.npy"),
        (["-n", "50000000"], 2, "choose 1 to 10000"),
        (["-o", "x" * 300 + ".png"], 2, "check the path"),
        (["--engines", "x" * 300], 2, "check the path"),
        (["--negative-2", "x"], 2, "--negative"),
        (["--provider", "cuda"], 2, "--provider"),
        (["--provider", "tensorrt"], 3, "pip install"),
        (["--provider", "ort-cuda"], 3, "sdxl-trt[gpu]"),
        (["--schedule", "karras+leading"], 2, "--schedule"),
        (["--refiner-sampler", "lmss"], 2, "--refiner-sampler 'lmss'"),
        (["--sampler", "lcm", "--steps", "60"], 2, "choose 1 to 50"),
        (["--guidance-interval", "0.5:0.2"], 2, "rising order"),
        (["--guidance-interval", "half"], 2, "two fractions"),
        (["--guidance-rescale", "2"], 2, "choose 0 to 1"),
        (["--vram", "much"], 2, "12GB"),
        (["--compat", "comfyui", "--schedule", "trailing"], 2, "choose one of: simple"),
        (["--original-size", "1024"], 2, "1024x768"),
        (["--crop", "left"], 2, "0,128"),
        (["--clip-skip", "9"], 2, "choose 0 to"),
        (["--handoff-sigma", "99"], 2, "no step"),
        (["--handoff-step", "4", "--base-end-step", "4"], 2, "state the same thing"),
        (["--workflow", "missing.json"], 2, "--workflow states PROMPT itself"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_generate_refuses(
    arguments: list[str], code: int, words: str, pairs: Any, fails: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = fails(trt_generate, ["a fox", "--engines", str(pairs("outline").bundle), *arguments], code)
    assert words in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_generate_names_what_is_wrong_with_a_bundle(bundle: Path, tmp_path: Path, fails: Any) -> None:
    def generate(code: int) -> str:
        return fails(trt_generate, ["a fox", "--engines", str(bundle), "-o", str(tmp_path / "x.png"), *FAST], code)

    weights = bundle / "unet" / "weights.data"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    assert "sha256" in generate(4)
    weights.write_bytes(content[:-1])
    assert "truncated" in generate(4)
    manifest = bundle / "manifest.json"
    original = manifest.read_text()
    manifest.write_text(original.replace('"format_version": 1', '"format_version": 2'))
    assert "newer" in generate(3)
    manifest.write_text(original[: len(original) // 2])
    assert "broken manifest" in generate(4)
    manifest.unlink()
    assert "export-engines" in generate(2)
    shutil.rmtree(bundle)
    assert "no such folder" in generate(2)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.slow
def test_a_handoff_needs_a_refiner(bundle: Path, tmp_path: Path, fails: Any) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["refiner"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    out = ["-o", str(tmp_path / "x.png"), "--engines", str(bundle)]
    assert "no refiner" in fails(trt_generate, ["a fox", *out, "--handoff", "0.8"], 2)
    assert trt_generate(["a fox", *out, "--steps", "2"]) == 0


@pytest.mark.slow
def test_export_refuses_sources(models: Path, tmp_path: Path, fails: Any) -> None:
    out = tmp_path / "out"
    base, refiner = str(models / "base"), str(models / "refiner")

    def export(code: int, *arguments: str) -> str:
        line = fails(export_engines, [*arguments, "--out", str(out)], code)
        assert not out.exists()
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
        return line

    assert "no such folder" in export(2, "--base", str(tmp_path / "nowhere"))
    assert "goes to --refiner" in export(2, "--base", refiner)
    assert "goes to --base" in export(2, "--base", base, "--refiner", base)
    assert "without --base" in export(2, "--refiner", refiner)
    index = models / "base" / "model_index.json"
    original = index.read_text()
    index.write_text(original.replace("StableDiffusionXLPipeline", "StableDiffusionPipeline"))
    assert "not SDXL" in export(2, "--base", base)
    index.write_text(original[:20])
    assert "broken JSON" in export(4, "--base", base)
    index.write_text(original)
    weights = models / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    assert "broken safetensors" in export(4, "--base", base)
    weights.unlink()
    weights.with_suffix(".bin").write_bytes(content)
    assert "pickled" in export(2, "--base", base)


@pytest.mark.slow
def test_export_leaves_foreign_folders_alone(models: Path, tmp_path: Path, fails: Any) -> None:
    out = tmp_path / "holiday"
    out.mkdir()
    (out / "photo.txt").write_text("sea")
    assert "is not a bundle" in fails(export_engines, ["--base", str(models / "base"), "--out", str(out)], 2)
    (out / "manifest.json").write_text('{"name": "a browser extension"}')
    assert "is not a bundle" in fails(export_engines, ["--base", str(models / "base"), "--out", str(out)], 2)
    assert {path.name for path in out.iterdir()} == {"photo.txt", "manifest.json"}
    assert "cannot be replaced" in fails(export_engines, ["--base", str(models / "base"), "--out", "."], 2)
    assert "unset" in fails(export_engines, ["--base", ""], 2)


@pytest.mark.slow
def test_a_failed_export_keeps_the_previous_bundle(bundle: Path, models: Path, fails: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    unet = models / "base" / "unet" / "config.json"
    config = json.loads(unet.read_text())
    unet.write_text(json.dumps(config | {"block_out_channels": [16, 32, 40]}))
    fails(export_engines, ["--base", str(models / "base"), "--out", str(bundle)], 4)
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before


@pytest.mark.slow
def test_a_run_never_imports_torch(bundle: Path, tmp_path: Path) -> None:
    code = f"""
import sys
for name in ("torch", "diffusers", "transformers", "scipy", "pandas", "onnx", "safetensors"):
    sys.modules[name] = None
from sdxl_trt.runtime.cli import main
sys.exit(main(["a fox", "--engines", {str(bundle)!r}, "-o", {str(tmp_path / "x.png")!r}, *{FAST!r}]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (tmp_path / "x.png").is_file()


def test_every_sampler_is_in_the_help() -> None:
    from sdxl_trt.runtime.diffusion.samplers.registry import sampler_names
    from sdxl_trt.runtime.request import request as options

    assert list(options.SAMPLERS) == sampler_names()


def test_every_schedule_of_comfyui_is_in_the_help() -> None:
    from sdxl_trt.runtime.diffusion.schedules.comfyui import COMFYUI_SCHEDULES
    from sdxl_trt.runtime.request import request as options

    assert tuple(COMFYUI_SCHEDULES) == options.COMFYUI_SCHEDULES


@pytest.mark.slow
def test_comfyui_options_affect_the_run(pairs: Any, tmp_path: Path, capsys: Any) -> None:
    from sdxl_trt.runtime import Request, open_bundle

    bundle, latents = pairs("outline").bundle, tmp_path / "x.npz"
    arguments = [
        "a (red:1.4) fox", "--engines", str(bundle), "-o", str(tmp_path / "x.png"), "--save-latents", str(latents),
        "--width", "32", "--height", "32", "--steps", "4", "--seed", "3", "--compat", "comfyui", "--schedule", "karras",
        "--sampler", "dpmpp_2m", "--base-end-step", "3", "--refiner-start-step", "2", "--refiner-add-noise",
        "--no-leftover-noise", "--original-size", "64x96", "--crop", "8,4", "--target-size", "32x48",
        "--clip-skip", "1",
    ]  # fmt: skip
    assert trt_generate(arguments) == 0
    err = capsys.readouterr().err
    assert "warning: the base stops at step 3, the refiner starts at 2" in err
    assert "warning: the refiner adds noise" in err
    request = Request(
        "a (red:1.4) fox", width=32, height=32, steps=4, seed=3, compat="comfyui", schedule="karras",
        sampler="dpmpp_2m", base_end_step=3, refiner_start_step=2, refiner_add_noise=True, leftover_noise=False,
        original_size=(96, 64), crop=(4, 8), target_size=(48, 32), clip_skip=1,
    )  # fmt: skip
    with open_bundle(bundle) as pipeline, np.load(latents) as found:
        list(pipeline.generate(request))
        np.testing.assert_allclose(found["handoff"], pipeline.run.handoff_latents, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found["final"], pipeline.run.final, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_sampler_schedule_and_guidance_options_affect_the_run(bundle: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "x.png"
    arguments = ["a fox", "--engines", str(bundle), "--seed", "7", "--json", "-o", str(out), *FAST]
    pixels, metadata = [], []
    for more in ([], ["--sampler", "dpmpp_2m_sde", "--refiner-sampler", "heun", "--schedule", "trailing+karras"],
                 ["--guidance-interval", "0:0.5"], ["--guidance-rescale", "0.7"], ["--tile"]):  # fmt: skip
        assert trt_generate([*arguments, *more]) == 0
        with Image.open(out) as image:
            pixels.append(np.asarray(image.convert("RGB")))
            metadata.append(json.loads(image.text["sdxl-trt"]))  # type: ignore[attr-defined]
    capsys.readouterr()
    assert all(not np.array_equal(pixels[0], other) for other in pixels[1:4])
    assert np.array_equal(pixels[0], pixels[4])  # the whole picture is one tile
    assert (metadata[1]["sampler"], metadata[1]["refiner_sampler"]) == ("dpmpp_2m_sde", "heun")
    assert metadata[1]["schedule"] == "trailing+karras"
    assert metadata[2]["guidance_interval"] == [0.0, 0.5]


def test_a_memory_plan_needs_neither_prompt_nor_gpu(pairs: Any, capsys: Any) -> None:
    arguments = ["--plan", "--engines", str(pairs("outline").bundle)]
    assert trt_generate([*arguments, "--vram", "12GB"]) == 0
    out = capsys.readouterr().out
    assert "tensorrt: 12.00 GB of device memory" in out
    assert "estimate" in out
    assert trt_generate([*arguments, "--vram", "12GB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["residency"], plan["capacity"]) == ("resident", 12_000_000_000)
    assert {need["component"] for need in plan["needs"]} >= {"unet", "refiner_unet", "vae_decoder"}


def test_a_plan_that_does_not_fit_is_an_error(pairs: Any, capsys: Any) -> None:
    assert trt_generate(["--plan", "--vram", "1MB", "--engines", str(pairs("outline").bundle)]) == 5
    captured = capsys.readouterr()
    assert "does not fit" in captured.out
    assert captured.err.startswith("error: tensorrt, residency stream")


def test_a_missing_prompt_is_an_error(fails: Any) -> None:
    assert "PROMPT is missing" in fails(trt_generate, [], 2)
