"""Runs on OpenVINO: the picture, what the command says and records, what is refused, and memory plans."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_trt.engines.backends.ov import settled_precision
from sdxl_trt.engines.bundle import read_bundle
from sdxl_trt.engines.errors import IncompatibleError
from sdxl_trt.mini import bundle_path
from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.adapters.use import LoraUse
from sdxl_trt.runtime.cli.generate import main as trt_generate
from sdxl_trt.runtime.images import read_texts, warn_of_another_bundle
from sdxl_trt.runtime.pipeline.record import read_settings

MakeLora = Callable[..., Path]
SMALL = Request("a red star", steps=2, width=64, height=64, seed=1, handoff=None)


def test_loras_of_8_bit_unets_are_refused(partly_int8_bundle: Path, make_lora: MakeLora, tmp_path: Path) -> None:
    lora = make_lora(tmp_path / "ink.safetensors")
    with (
        open_bundle(partly_int8_bundle, provider="openvino") as pipeline,
        pytest.raises(IncompatibleError, match="unet is int8, and LoRAs cannot change 8-bit weights on OpenVINO; fuse"),
    ):
        list(pipeline.generate(replace(SMALL, loras=(LoraUse(str(lora)),))))


def test_a_command_says_and_records_what_it_computed_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The picture is that of ONNX Runtime, as near as what OpenVINO computes in allows."""
    argv = ["a red star", "--no-refiner", "--steps", "4", "--seed", "7"]
    pictures = {}
    for provider in ("openvino", "ort-cpu"):
        pictures[provider] = tmp_path / f"{provider}.png"
        assert trt_generate([*argv, "--provider", provider, "-o", str(pictures[provider])]) == 0
        said = capsys.readouterr().err
        assert ("by OpenVINO" in said) == (provider == "openvino")
    computed = settled_precision("auto")
    recorded = {name: json.loads(read_texts(path)["sdxl-trt"]).get("computed") for name, path in pictures.items()}
    assert recorded == {"openvino": "bf16" if computed == "bf16" else None, "ort-cpu": None}
    drawn, reference = (np.asarray(Image.open(path), np.float32) for path in pictures.values())
    assert 10 * np.log10(255**2 / np.mean((drawn - reference) ** 2)) > (30 if computed == "bf16" else 55)
    assert read_settings(pictures["openvino"]).computed == recorded["openvino"]


@pytest.mark.parametrize(("then", "now"), [("bf16", None), (None, "bf16"), ("bf16", "fp32")])
def test_another_precision_than_the_picture_s_is_a_warning(
    then: str | None, now: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = read_bundle(bundle_path()).manifest
    warn_of_another_bundle(None, manifest, then, then)
    warn_of_another_bundle(None, manifest, None, "fp32")
    assert not caplog.text
    warn_of_another_bundle(None, manifest, then, now)
    assert "this run computes in" in caplog.text


@pytest.mark.parametrize("more", [[], ["--plan"], ["--plan", "--vram", "12GB"]])
def test_a_compute_precision_of_another_provider_is_refused(fails: Callable[..., str], more: list[str]) -> None:
    argv = ["a star", "--provider", "ort-cpu", "--compute-precision", "bf16", *more]
    assert "--compute-precision bf16 goes with --provider openvino" in fails(trt_generate, argv, 2)


def test_a_plan_counts_host_memory_and_swaps(capsys: pytest.CaptureFixture[str]) -> None:
    assert trt_generate(["--plan", "--provider", "openvino", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["provider"], plan["residency"]) == ("openvino", "swap")
    weights = {need["component"]: need["weights"] for need in plan["needs"]}
    assert weights["unet"] == int(7863076 * 4 * 2.8)
