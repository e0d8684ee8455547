"""A sound 8-bit component passes; one whose scales do not belong to its weights fails by name."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.errors import VerificationError
from sdxl_trt.export.components import Options, plan_components
from sdxl_trt.export.sources.source import BASE_CLASS, open_pipeline
from sdxl_trt.export.verify.recording import RecordedPicture, RecordingSettings
from sdxl_trt.export.verify.verify import verify_bundle


def test_int8_passes_and_wrong_scales_fail(
    pairs: Callable[[str], Any], eight_bit_bundle: Path, tmp_path: Path, edit_weight: Any
) -> None:
    options = Options(precision="int8", vae_precision="int8")
    components, stages = plan_components(
        open_pipeline(pairs("outline").base, BASE_CLASS), None, options, lambda _: None
    )
    plans = {name: components[name] for name in ("text_encoder", "text_encoder_2", "unet")}
    settings = RecordingSettings(
        pictures=(RecordedPicture((16, 16), ((0,), (1,))),), base_grid=(0.999,), refiner_grid=(0.1498,)
    )
    root = Path(shutil.copytree(eight_bit_bundle, tmp_path / "bundle"))
    report = verify_bundle(read_bundle(root), plans, stages, settings=settings)
    report.require()
    parts = [report.components[name] for name in ("unet", "unet/cpu.onnx")]
    worst = min(case.comparisons[0].figures.rank for part in parts for case in part.cases)
    assert 36 < worst < 60  # 8 bits, not floats
    edit_weight(root, "unet", "up_blocks.2.resnets.1.conv2.weight_scale", lambda scale: scale * 2)
    report = verify_bundle(read_bundle(root), plans, stages, settings=settings)
    assert [name for name, part in report.components.items() if not part.passed] == ["unet"]
    failures = "\n".join(report.components["unet"].failures)
    assert "times as far from PyTorch fp32 as PyTorch's own rounding" in failures
    assert "unet/model.onnx: up_blocks.2.resnets.1.conv2: its weight is further" in failures
    assert "(mean size 2.000 of the checkpoint's)" in failures
    with pytest.raises(VerificationError, match="unet"):
        report.require()
