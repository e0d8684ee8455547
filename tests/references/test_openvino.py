"""Whole runs on OpenVINO against ONNX Runtime: with the refiner, LoRAs, ControlNets and other sizes."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdxl_trt.engines.backends.ov import settled_precision
from sdxl_trt.engines.bundle import read_bundle, read_table
from sdxl_trt.engines.errors import IncompatibleError
from sdxl_trt.export import Options, export_bundle
from sdxl_trt.mini import bundle_path
from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.adapters.use import LoraUse
from sdxl_trt.runtime.controls.use import ControlUse
from sdxl_trt.runtime.images.inputs import as_input
from sdxl_trt.runtime.pipeline.pipeline import Pipeline

SMALL = Request("a red star", steps=4, width=64, height=64, seed=1, handoff=0.5)
EDGES = ControlUse(as_input(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)), 0.8)
Opened = Callable[[Path, str], tuple[Pipeline, Pipeline]]


@pytest.fixture(scope="module")
def opened() -> Iterator[Opened]:
    """Return a function that opens a bundle on ONNX Runtime, and on OpenVINO in a precision."""
    pipelines: dict[Any, Pipeline] = {}

    def get(root: Path, precision: str) -> tuple[Pipeline, Pipeline]:
        for key, settings in (
            ((root, "ort"), {"provider": "ort-cpu"}),
            ((root, precision), {"provider": "openvino", "compute_precision": precision}),
        ):
            if key not in pipelines:
                pipelines[key] = open_bundle(root, residency="resident", **settings)
        return pipelines[root, "ort"], pipelines[root, precision]

    yield get
    for pipeline in pipelines.values():
        pipeline.pool.close()


def _drawn(pipeline: Pipeline, request: Request) -> tuple[np.ndarray, np.ndarray]:
    """Return the latents of one request's pictures, and their pixels from 0 to 255."""
    pictures = list(pipeline.generate(request))
    pixels = np.stack([np.asarray(picture.image, np.float32) for picture in pictures])
    return np.stack([picture.latents.astype(np.float32) for picture in pictures]), pixels


def _write_lora(path: Path) -> Path:
    """Write a LoRA in kohya's names for projections of the base's UNet and of a text encoder."""
    rng, tensors = np.random.default_rng(0), {}
    for part, prefix in (("unet", "lora_unet"), ("text_encoder_2", "lora_te2")):
        shapes = read_table(read_bundle(bundle_path()), part).shapes
        for name in [name for name in shapes if name.endswith((".to_q.weight", ".q_proj.weight"))][:4]:
            module = f"{prefix}_{name.removesuffix('.weight').replace('.', '_')}"
            outputs, inputs = shapes[name]
            tensors[f"{module}.lora_down.weight"] = rng.standard_normal((2, inputs), dtype=np.float32)
            tensors[f"{module}.lora_up.weight"] = rng.standard_normal((outputs, 2), dtype=np.float32)
    save_file(tensors, path)
    return path


def _off(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_pairs_in_fp32_draw_the_latents_of_onnx_runtime(pairs: Callable[[str], Any], opened: Opened) -> None:
    """Sizes that are not square, batches and runs without guidance have shapes of their own; the first comes back."""
    reference, tested = opened(pairs("outline").bundle, "fp32")
    requests = [SMALL, replace(SMALL, width=96, count=3), replace(SMALL, guidance=1.0), SMALL]
    for request in requests:
        (expected, before), (found, after) = (_drawn(each, request) for each in (reference, tested))
        assert _off(found, expected) < 1e-4
        assert np.abs(before - after).max() <= 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_embedded_pair_with_a_lora_draws_what_onnx_runtime_draws(
    precision: str, opened: Opened, tmp_path: Path
) -> None:
    """Its graphs are fp16 outside, so that the last bits of a step are rounded."""
    if precision == "bf16" and settled_precision("auto") != "bf16":
        pytest.skip("this CPU does not compute in bf16")
    lora = LoraUse(str(_write_lora(tmp_path / "ink.safetensors")), 0.8)
    reference, tested = opened(bundle_path(), precision)
    plain = _drawn(reference, SMALL)[0]
    for request in (SMALL, replace(SMALL, loras=(lora,)), SMALL):
        (expected, before), (found, after) = (_drawn(each, request) for each in (reference, tested))
        assert _off(found, expected) < (6e-3 if precision == "fp32" else 0.12)
        assert 10 * np.log10(255**2 / np.mean((before - after) ** 2)) > (50 if precision == "fp32" else 25)
        if request.loras:
            assert _off(expected, plain) > 10 * _off(found, expected)


def test_controlnets_add_their_residuals_on_openvino_too(controlled: Path, opened: Opened) -> None:
    reference, tested = opened(controlled, "fp32")
    request = replace(SMALL, controls=(EDGES,), handoff=None)
    plain = _drawn(reference, replace(request, controls=()))[0]
    expected, found = (_drawn(each, request)[0] for each in (reference, tested))
    assert _off(found, expected) < 3e-3
    assert _off(expected, plain) > 10 * _off(found, expected)


def _exported(pairs: Callable[[str], Any], out: Path, *options: Any, **more: Any) -> Path:
    """Export parts of the pair "outline" again over a copy of its fp32 bundle."""
    pair = pairs("outline")
    shutil.copytree(pair.bundle, out)
    export_bundle(pair.base, pair.refiner, out, Options(*options, **more))
    return out


@pytest.mark.slow
@pytest.mark.usefixtures("converted_once")
def test_bf16_bundles_compute_in_bf16_or_are_refused(
    pairs: Callable[[str], Any], opened: Opened, tmp_path: Path
) -> None:
    """ONNX Runtime's CPU provider has no bf16: the reference is its run of the same pair in fp32."""
    root = _exported(pairs, tmp_path / "bf16", "bf16", components=frozenset({"unet"}))
    expected, before = _drawn(opened(pairs("outline").bundle, "fp32")[0], SMALL)
    with (
        open_bundle(root, provider="openvino", compute_precision="fp32") as pipeline,
        pytest.raises(IncompatibleError, match="unet is bf16, which OpenVINO does not compute in fp32; export it"),
    ):
        list(pipeline.generate(SMALL))
    if settled_precision("auto") != "bf16":
        pytest.skip("this CPU does not compute in bf16")
    with open_bundle(root, provider="openvino") as pipeline:
        found, after = _drawn(pipeline, SMALL)
    assert 1e-3 < _off(found, expected) < 0.12
    assert 10 * np.log10(255**2 / np.mean((before - after) ** 2)) > 30


@pytest.mark.slow
@pytest.mark.usefixtures("converted_once")
def test_mixed_decoders_decode_what_onnx_runtime_decodes(
    pairs: Callable[[str], Any], opened: Opened, tmp_path: Path
) -> None:
    root = _exported(pairs, tmp_path / "mixed", "fp32", "mixed", components=frozenset({"vae_decoder"}))
    assert read_bundle(root).manifest.components["vae_decoder"].precision == "mixed"
    reference, tested = opened(root, "fp32")
    (expected, before), (found, after) = (_drawn(each, SMALL) for each in (reference, tested))
    assert _off(found, expected) < 1e-4
    assert np.abs(before - after).max() <= 1


@pytest.mark.slow
def test_fp8_bundles_are_refused(fp8_bundle: Path) -> None:
    with (
        open_bundle(fp8_bundle, provider="openvino") as pipeline,
        pytest.raises(IncompatibleError, match="unet is fp8, which OpenVINO does not compute in; use --provider ort"),
    ):
        list(pipeline.generate(SMALL))
