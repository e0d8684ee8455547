"""8-bit exports as a whole: what is kept, resumed and made again, layers left out for a PSNR, and verification."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from sdxl_trt.engines.bundle import Bundle
from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.errors import CorruptError, UsageError
from sdxl_trt.export import Options, export_bundle, exporter
from sdxl_trt.export.components import CalibrationOptions
from sdxl_trt.export.exporter import plan_export
from sdxl_trt.export.output.staging import partial_folder
from sdxl_trt.export.quantize import component, quantize

QUICK: Any = {"prompts": ("a red fox",), "steps": (2, 1)}


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch, converted_once: None) -> list[str]:
    """The names of the components that were quantized; put "!name" in the list to interrupt that one."""
    calls: list[str] = []
    real = component.quantize_component

    def run(job: Any, root: Path, *rest: Any, name: str | None = None) -> Any:
        if f"!{job.name}" in calls:
            raise KeyboardInterrupt
        calls.append(name or job.name)
        return real(job, root, *rest, name=name)

    monkeypatch.setattr(quantize, "quantize_component", run)
    return calls


def _export(pair: Any, out: Path, *, refiner: bool = False, calibration: Any = None, **options: Any) -> Bundle:
    settings = CalibrationOptions(**(QUICK if calibration is None else calibration))
    return export_bundle(pair.base, pair.refiner if refiner else None, out,
                         Options(**{"precision": "int8", "calibration": settings, **options}))  # fmt: skip


def _content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_manifest_says_what_computes_in_8_bits(eight_bit_bundle: Path, fp8_bundle: Path) -> None:
    components = read_bundle(eight_bit_bundle).manifest.components
    assert {name: each.precision for name, each in components.items()} == {
        "text_encoder": "fp16", "text_encoder_2": "fp16", "unet": "int8", "refiner_unet": "int8", "vae_decoder": "int8",
        "vae_encoder": "fp32", "unet_shallow": "int8", "refiner_unet_shallow": "int8",
    }  # fmt: skip
    assert components["vae_decoder"].float_precision == "fp32"
    assert {spec.dtype for spec in components["unet"].outputs} == {"float16"}
    told, narrow = components["unet"].quantization, read_bundle(fp8_bundle).manifest.components["unet"].quantization
    assert told is not None
    assert narrow is not None
    assert told.calibration == "1 prompt, 32x32, 2 + 1 steps"
    assert narrow.calibration == "ranges of ranges.npz"
    assert (told.ranges, told.linears, told.excluded) == (narrow.ranges, narrow.linears, narrow.excluded)
    assert (told.attentions, narrow.attentions) == (0, 22)
    assert "conv_in" in told.excluded
    report = json.loads((eight_bit_bundle.parent / "report.json").read_text())
    assert report.keys() == {"unet", "refiner_unet", "vae_decoder"}
    errors = [layer["snr_db"] for layer in report["unet"]["layers"]]
    assert errors == sorted(errors)
    assert {each["module"] for each in report["unet"]["layers"] if each["excluded"]} == told.excluded.keys()
    assert report["unet"]["step_psnr_db"] > 35


def test_an_attention_stays_in_floating_point_with_the_layer_of_its_queries(
    pairs: Callable[[str], Any], tmp_path: Path, eight_bit_bundle: Path, quantized: list[str]
) -> None:
    ranges = eight_bit_bundle.parent / "ranges.npz"
    found = _export(pairs("outline"), tmp_path / "out", precision="fp8", components=frozenset({"unet"}),
                    calibration={"file": ranges, "exclude": ("mid_block.*.attn2.to_q",)})  # fmt: skip
    ops = [node.op_type for node in ir.load(tmp_path / "out" / "unet" / "model.onnx").graph]
    told = found.manifest.components["unet"].quantization
    assert told is not None
    excluded = [module for module in told.excluded if module.endswith("to_q")]
    assert excluded
    assert all(module.startswith("mid_block") for module in excluded)
    assert (ops.count("Attention"), ops.count("Softmax")) == (len(excluded), told.attentions)


def test_an_interrupted_export_resumes_and_an_unchanged_one_is_kept(
    pairs: Callable[[str], Any], tmp_path: Path, quantized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, out = pairs("outline"), tmp_path / "out"
    quantized.append("!vae_decoder")
    with pytest.raises(KeyboardInterrupt):
        _export(pair, out, vae_precision="int8")
    assert quantized == ["!vae_decoder", "unet"]
    assert {"unet", "unet.floats", "vae_decoder.floats"} <= {part.name for part in partial_folder(out).iterdir()}
    assert not out.exists()
    quantized.clear()
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "convert_component", lambda name, *_, **__: pytest.fail(f"{name} is traced"))
        _export(pair, out, vae_precision="int8")
        assert quantized == ["vae_decoder"]
        before = _content(out)
        assert not any(".floats" in name for name in before)
        quantized.clear()
        _export(pair, out, vae_precision="int8")
        assert quantized == []
        assert _content(out) == before
        assert list(tmp_path.glob(".*partial")) == []

    with pytest.raises(UsageError, match="--min-psnr 190: vae_decoder does not come that close"):
        _export(pair, out, calibration={**QUICK, "min_psnr": 190.0}, precision="fp16", vae_precision="int8")
    assert _content(out) == before
    assert list(tmp_path.glob(".*partial")) == []


def test_8_bits_after_fp16_in_the_same_folder(
    pairs: Callable[[str], Any], tmp_path: Path, quantized: list[str]
) -> None:
    pair, out = pairs("outline"), tmp_path / "out"
    before = export_bundle(pair.base, None, out, Options(precision="fp16"))
    after = _export(pair, out, components=frozenset({"unet"}))
    assert quantized == ["unet"]
    one, other = before.manifest.components, after.manifest.components
    assert {name for name in one if one[name] != other[name]} == {"unet", "unet_shallow"}
    assert after.manifest.precision == "int8"


def test_layers_are_left_out_until_a_step_comes_close_enough(
    pairs: Callable[[str], Any], tmp_path: Path, quantized: list[str]
) -> None:
    pair = pairs("outline")
    report = tmp_path / "report.json"
    options: Any = {"precision": "fp16", "vae_precision": "int8"}
    plain = _export(pair, tmp_path / "plain", calibration={**QUICK, "report": report}, **options)
    (reached,) = (part["step_psnr_db"] for part in json.loads(report.read_text()).values())
    quantized.clear()
    wanted = reached + 3
    close = _export(pair, tmp_path / "close", calibration={**QUICK, "report": report, "min_psnr": wanted}, **options)
    told = json.loads(report.read_text())["vae_decoder"]
    assert told["step_psnr_db"] >= round(wanted, 2)
    assert quantized.count("trial") <= 6  # of some 30 layers
    one, other = (each.manifest.components["vae_decoder"].quantization for each in (plain, close))
    assert one is not None
    assert other is not None
    added = other.excluded.keys() - one.excluded.keys()
    assert added
    assert all("too much for --min-psnr" in other.excluded[module] for module in added)
    errors = {layer["module"]: layer["snr_db"] for layer in told["layers"]}
    kept = errors.keys() - other.excluded.keys()
    assert max(errors[module] for module in added) <= min(errors[module] for module in kept)  # the worst first
    assert not (tmp_path / "close" / "trial").exists()


def test_a_component_that_computes_nan_while_it_is_measured_is_refused(
    pairs: Callable[[str], Any], tmp_path: Path, quantized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdxl_trt.export.quantize.session import GraphSession

    real = GraphSession.run

    def run(self: GraphSession, inputs: Any, names: Any) -> Any:
        found = real(self, inputs, names)
        if "out_sample" in found:
            found["out_sample"][0, 0, 0, 0] = np.nan
        return found

    monkeypatch.setattr(GraphSession, "run", run)
    with pytest.raises(CorruptError, match="unet: out_sample holds NaN or infinity"):
        _export(pairs("outline"), tmp_path / "out")
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_key_covers_all_that_determines_8_bit_files(
    pairs: Callable[[str], Any], eight_bit_bundle: Path, tmp_path: Path
) -> None:
    pair, ranges = pairs("outline"), eight_bit_bundle.parent / "ranges.npz"

    def keys(**calibration: Any) -> dict[str, str]:
        options = Options(precision="int8", vae_precision="int8", calibration=CalibrationOptions(**calibration))
        return {name: job.key for name, job in plan_export(pair.base, None, tmp_path / "out", options).jobs.items()}

    usual = keys(**QUICK)
    same = (keys(**QUICK, save=tmp_path / "ranges.npz"), keys(**QUICK, report=tmp_path / "report.json"))
    assert all(each == usual for each in same)
    copied = Path(shutil.copy(ranges, tmp_path / "copied.npz"))
    assert keys(file=ranges) == keys(file=copied)
    with np.load(ranges) as content:
        np.savez(copied, **{name: content[name] for name in content.files})  # not compressed: other bytes
    found = [usual, keys(), keys(prompts=("a blue star",), steps=(2, 1)), keys(prompts=QUICK["prompts"], steps=(2, 2)),
             keys(**QUICK, size=64), keys(**QUICK, exclude=("up_blocks.2.*",)), keys(**QUICK, min_psnr=40.0),
             keys(file=ranges), keys(file=copied)]  # fmt: skip
    for name in usual:
        assert len({each[name] for each in found}) == (len(found) if name in ("unet", "vae_decoder") else 1), name
    assert list(tmp_path.iterdir()) == [copied]


def test_a_kept_component_is_planned_as_what_it_is(pairs: Callable[[str], Any], eight_bit_bundle: Path) -> None:
    """Whatever the other components are exported in: verification needs the precision of its other layers."""
    pair = pairs("outline")
    options = Options(precision="fp32", components=frozenset({"vae_encoder"}))
    jobs = plan_export(pair.base, pair.refiner, eight_bit_bundle, options).jobs
    told = {name: (job.action, job.plan.precision, job.plan.floats) for name, job in jobs.items()}
    assert told["unet"] == told["refiner_unet"] == ("keep", "int8", "fp16")
    assert told["vae_decoder"] == ("keep", "int8", "fp32")
    assert told["text_encoder"] == ("keep", "fp16", None)
