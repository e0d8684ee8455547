"""Activations beyond fp16, planted without changing the model's output."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.errors import VerificationError
from sdxl_trt.export.components import ComponentPlan, Options, StagePlan, plan_components
from sdxl_trt.export.sources.source import BASE_CLASS, open_pipeline
from sdxl_trt.export.verify.overflow import FP16_MAX, NEAR_MISS, overflows, watch_dtypes, watch_peaks
from sdxl_trt.export.verify.recording import RecordedPicture, RecordingSettings
from sdxl_trt.export.verify.verify import verify_bundle

SMALL = RecordingSettings(
    pictures=(RecordedPicture((8, 8), ((0,), (1,))), RecordedPicture((16, 8), ((0, 2),), whole=False))
)
CONV = "decoder.mid_block.resnets.0.conv1"


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(2, 2, bias=False)
        self.norm = torch.nn.LayerNorm(2)
        torch.nn.init.constant_(self.first.weight, 100.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.first(x) - 5.0)


def _watch(model: torch.nn.Module, *values: float) -> dict[str, float]:
    with watch_peaks(model) as peaks:
        for value in values:
            model(torch.full((1, 2), value))
    return peaks


def test_peaks_are_the_largest_of_all_calls_in_the_order_of_execution() -> None:
    model = _Model()
    assert _watch(model, 1.0, -3.0, 2.0) == {
        "first (input)": 3.0, "first": 600.0, "norm (input)": 605.0, "norm": pytest.approx(0.0, abs=1e-3),
    }  # fmt: skip
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nan_is_an_overflow() -> None:
    assert _watch(_Model(), float("nan"))["first"] == float("inf")


def test_only_fp16_activations_overflow() -> None:
    model = _Model()
    peaks = _watch(model, 400.0)
    with watch_dtypes(model.half()) as dtypes:
        model(torch.ones(1, 2, dtype=torch.float16))
    assert [peak.module for peak in overflows(peaks, dtypes)] == ["first", "norm (input)"]
    assert overflows(peaks, dtypes | {"first": torch.float32, "norm (input)": torch.bfloat16}) == []
    near = _watch(model.float(), 200.0)
    assert overflows(near, dtypes) == []
    assert [peak.module for peak in overflows(near, dtypes, NEAR_MISS)] == ["first", "norm (input)"]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded pair, with its autoencoder exported in fp16: `base/` and its `bundle/`."""
    from sdxl_trt.mini.embedded import bundle_path
    from sdxl_trt.mini.pair import materialize

    folder = tmp_path_factory.mktemp("half")
    materialize(folder)
    shutil.copytree(bundle_path(), folder / "bundle")
    return folder


def _decoder(base: Path, precision: Any) -> tuple[dict[str, ComponentPlan], dict[str, StagePlan]]:
    options = Options(precision=precision, vae_precision=precision)
    components, stages = plan_components(open_pipeline(base, BASE_CLASS), None, options, pytest.fail)
    return {"vae_decoder": components["vae_decoder"]}, stages


def _copy(base: Path, bundle: Path, target: Path) -> tuple[Path, Path]:
    shutil.copytree(base, target / "base")
    shutil.copytree(bundle, target / "bundle")
    return target / "base", target / "bundle"


def _plant(base: Path, bundle: Path, edit: Callable[..., None]) -> float:
    """Scale a convolution that feeds only a group normalization, in checkpoint and bundle; return the factor."""
    from safetensors.numpy import load_file, save_file

    file = base / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    names = [f"{CONV}.weight", f"{CONV}.bias"]
    largest = max(float(np.abs(tensors[name]).max()) for name in names)
    factor = 2.0 ** np.floor(np.log2(FP16_MAX / largest))

    def scaled(array: Any) -> Any:
        return (array.astype(np.float64) * factor).astype(array.dtype)  # the factor itself may overflow fp16

    for name in names:
        tensors[name] = scaled(tensors[name])
        assert np.isfinite(tensors[name]).all()
        edit(bundle, "vae_decoder", name, scaled)
    save_file(tensors, file)
    return float(factor)


@pytest.mark.slow
def test_fp16_fails_on_an_overflow_and_names_the_module(
    half: Path, tmp_path: Path, edit_weight: Callable[..., None]
) -> None:
    sound = verify_bundle(read_bundle(half / "bundle"), *_decoder(half / "base", "fp16"), settings=SMALL)
    assert sound.lines() == [line for line in sound.lines() if "failed" not in line]
    assert sound.passed

    base, root = _copy(half / "base", half / "bundle", tmp_path)
    _plant(base, root, edit_weight)
    bundle: Bundle = read_bundle(root)
    broken = verify_bundle(bundle, *_decoder(base, "fp16"), settings=SMALL)
    assert not broken.passed
    assert broken.components["vae_decoder"].failures[0].startswith(f"{CONV} reaches ")
    assert broken.components["vae_decoder"].peaks[0].value > FP16_MAX
    with pytest.raises(VerificationError, match=f"^vae_decoder: {CONV} .*--vae-precision fp32") as caught:
        broken.require()
    assert "\n" not in str(caught.value)

    components, stages = _decoder(base, "fp16")
    wide = replace(components["vae_decoder"], precision="bf16")  # type: ignore[arg-type]
    report = verify_bundle(bundle, {"vae_decoder": wide}, stages, settings=SMALL)
    part = report.components["vae_decoder"]
    assert part.passed
    assert "bf16" in part.not_run
    assert {each.found for case in part.cases for each in case.comparisons} == {"PyTorch bf16"}


@pytest.mark.slow
def test_the_planted_overflow_does_not_change_the_fp32_model(
    pairs: Callable[[str], Any], tmp_path: Path, edit_weight: Callable[..., None]
) -> None:
    pair = pairs("outline")
    base, root = _copy(pair.base, pair.bundle, tmp_path)
    before = verify_bundle(read_bundle(root), *_decoder(base, "fp32"), settings=SMALL)
    assert _plant(base, root, edit_weight) > 2**15
    after = verify_bundle(read_bundle(root), *_decoder(base, "fp32"), settings=SMALL)
    for report in (before, after):
        assert report.passed, report.lines()
    peaks = [report.components["vae_decoder"].peaks[0].value for report in (before, after)]
    assert peaks[0] < FP16_MAX < peaks[1]
