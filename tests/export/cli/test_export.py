"""export-engines from a user's view: dry runs, LoRAs, another autoencoder, verification, optimum's layout."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.host.progress import ProgressLine
from sdxl_trt.export.cli.export import main
from sdxl_trt.export.cli.summary import export_progress
from sdxl_trt.export.components.progress import ExportEvent

MODULE = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("converted_once")]


@pytest.fixture
def pair(pairs: Callable[[str], Any]) -> Any:
    return pairs("outline")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    tensors = {
        f"lora_unet_{MODULE}.lora_down.weight": rng.normal(size=(2, 32)).astype(np.float32),
        f"lora_unet_{MODULE}.lora_up.weight": rng.normal(size=(32, 2)).astype(np.float32),
        f"lora_unet_{MODULE}.alpha": np.float32(2),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": rng.normal(size=(1, 32)).astype(np.float32),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": rng.normal(size=(64, 1)).astype(np.float32),
    }
    path = tmp_path / "style.safetensors"
    save_file({name: np.asarray(tensor) for name, tensor in tensors.items()}, path)
    return path


def test_a_dry_run_prints_what_would_be_done(pair: Any, tmp_path: Path, capsys: Any) -> None:
    sources = ["--base", str(pair.base), "--refiner", str(pair.refiner), "--fp32"]
    assert main([*sources, "--out", str(tmp_path / "new"), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "refiner_unet" in output
    assert "nothing written; needs" in output
    assert list(tmp_path.iterdir()) == []
    out = Path(shutil.copytree(pair.bundle, tmp_path / "out"))
    assert main([*sources, "--out", str(out), "--dry-run", "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert {part["action"] for part in output["components"].values()} == {"keep"}
    assert output["needs"]["disk"] == 0
    assert main([*sources, "--vae-precision", "fp16", "--out", str(out), "--dry-run", "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    actions = {name: part["action"] for name, part in output["components"].items() if part["action"] == "export"}
    assert actions == {"vae_decoder": "export", "vae_encoder": "export"}


def test_a_lora_is_fused_and_recorded_in_the_manifest(pair: Any, lora: Path, tmp_path: Path, capsys: Any) -> None:
    out = Path(shutil.copytree(pair.bundle, tmp_path / "out"))
    sources = ["--base", str(pair.base), "--refiner", str(pair.refiner), "--fp32", "--out", str(out)]
    assert main([*sources, "--lora", f"{lora}:0.5", "--json"]) == 0
    captured = capsys.readouterr()
    assert "refiner was not trained with this LoRA" in captured.err
    (output,) = json.loads(captured.out)["loras"]
    assert (output["name"], output["scale"], output["text_scale"]) == ("style.safetensors", 0.5, 0.5)
    before, after = (read_bundle(root).manifest for root in (pair.bundle, out))
    changed = {n for n, c in after.components.items() if c.key != before.components[n].key}
    assert changed == {"unet", "unet_shallow", "text_encoder"}
    assert '"text_scale"' not in (out / "manifest.json").read_text()
    assert main([*sources, "--lora", f"{lora}:0.5:0.25", "--dry-run", "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert {name for name, part in output["components"].items() if part["action"] == "export"} == {"text_encoder"}
    assert (output["loras"][0]["scale"], output["loras"][0]["text_scale"]) == (0.5, 0.25)
    assert [record.name for record in after.loras] == ["style.safetensors"]
    assert main([*sources, "--json"]) == 0  # and removed again
    assert read_bundle(out).manifest == before


def test_loras_that_do_not_fit_leave_the_bundle_unchanged(pair: Any, lora: Path, tmp_path: Path, capsys: Any) -> None:
    out = Path(shutil.copytree(pair.bundle, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    sources = ["--base", str(pair.refiner.parent / "base"), "--no-refiner", "--out", str(out)]
    for option, words, code in (
        (f"{lora}:much", "is not a scale", 2),
        (f"{lora}:1:much", "'much' is not a scale", 2),
        (str(tmp_path / "none.safetensors"), "none.safetensors", 2),
        (str(pair.base / "unet" / "diffusion_pytorch_model.safetensors"), "LoRA", 2),
    ):
        assert main([*sources, "--lora", option]) == code
        assert words in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_another_autoencoder_is_used_for_both_stages(pair: Any, tmp_path: Path, capsys: Any) -> None:
    vae = Path(shutil.copytree(pair.base / "vae", tmp_path / "fixed"))
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"force_upcast": False, "scaling_factor": 0.5}))
    arguments = ["--base", str(pair.base), "--refiner", str(pair.refiner), "--vae", str(vae)]
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out), "--components", "vae_decoder,vae_encoder"]) == 0
    manifest = read_bundle(out, partial=True).manifest
    assert {c.precision for c in manifest.components.values()} == {"fp16"}
    assert {c.source.name for c in manifest.components.values()} == {"fixed"}
    assert [stage.vae.scaling_factor for stage in manifest.stages().values()] == [0.5, 0.5]
    capsys.readouterr()
    assert main(["--vae", str(tmp_path / "nothing"), "--out", str(out)]) == 2


def test_verify_reports_and_a_failure_keeps_the_older_bundle(pair: Any, tmp_path: Path, capsys: Any) -> None:
    import torch
    from diffusers import AutoencoderKL

    out = Path(shutil.copytree(pair.bundle, tmp_path / "out"))
    sources = ["--refiner", str(pair.refiner), "--out", str(out), "--verify"]
    assert main(["--base", str(pair.base), "--fp32", *sources]) == 0
    report = json.loads((out / "verify.json").read_bytes())
    assert report["passed"] is True
    components = read_bundle(out).manifest.components
    components = {name: one for name, one in components.items() if one.kind != "shallow_unet"}  # beside their UNets
    for_cpu = {component.cpu_graph.file for component in components.values() if component.cpu_graph}
    assert set(report["components"]) == set(components) | for_cpu
    capsys.readouterr()

    base = Path(shutil.copytree(pair.base, tmp_path / "base"))
    vae = AutoencoderKL.from_pretrained(base / "vae")
    with torch.no_grad():
        convolution = vae.decoder.mid_block.resnets[0].conv1
        convolution.weight *= 2.0**20
        convolution.bias *= 2.0**20
    vae.save_pretrained(base / "vae")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(["--base", str(base), "--fp32", "--vae-precision", "fp16", *sources]) == 1
    assert "mid_block.resnets.0.conv1" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_the_optimum_layout_has_two_folders(pair: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    sources = ["--base", str(pair.base), "--refiner", str(pair.refiner), "--fp32", "--out", str(out)]
    assert main([*sources, "--layout", "optimum"]) == 0
    assert {path.name for path in out.iterdir()} == {"base", "refiner", "manifest.json"}
    for stage in ("base", "refiner"):
        assert (out / stage / "model_index.json").is_file()
        assert (out / stage / "unet" / "model.onnx").is_file()
    assert list(tmp_path.iterdir()) == [out]
    capsys.readouterr()
    assert main([*sources, "--layout", "optimum", "--components", "unet"]) == 2


def test_the_progress_line_names_component_stage_bytes_and_rate(terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with ProgressLine(terminal) as line:
        show = export_progress(line)
        for seconds, component, stage, written in [
            (1, "unet", "writing weights", 0), (2, "unet", "writing weights", 1_000_000),
            (2.05, "unet", "writing weights", 1_500_000), (9, "vae_decoder", "tracing", 4_000_000),
        ]:  # fmt: skip
            terminal.clock = seconds
            show(ExportEvent(component, stage, 1 + (component != "unet"), 2, written, 4_000_000))
    *_, first, second, third = terminal.lines
    assert first.startswith("[1/2] unet: writing weights:   0%|")
    assert second.startswith("[1/2] unet: writing weights:  25%|")
    assert second.endswith("| 1.00M/4.00M [00:02<00:06, 500kB/s]")
    assert third.startswith("[2/2] vae_decoder: tracing: 100%|")  # what came 0.05 s after another is not drawn
    assert third.endswith("| 4.00M/4.00M [00:09<00:00, 444kB/s]")
