"""bf16, mixed precision and the older opsets, against PyTorch and on ONNX Runtime."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import AutoencoderKL
from onnx.reference import ReferenceEvaluator

from sdxl_trt.engines.errors import IncompatibleError, UsageError
from sdxl_trt.export import Options, export_bundle
from sdxl_trt.runtime import Request, open_bundle

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("converted_once")]


def _types(path: Path) -> dict[ir.DataType, int]:
    counts: dict[ir.DataType, int] = {}
    for value in ir.load(path).graph.initializers.values():
        counts[value.dtype] = counts.get(value.dtype, 0) + 1
    return counts


def test_bf16_is_internal_only_and_onnx_runtime_refuses_it(pairs: Callable[[str], Any], tmp_path: Path) -> None:
    pair = pairs("outline")
    root = Path(shutil.copytree(pair.bundle, tmp_path / "out"))
    bundle = export_bundle(pair.base, pair.refiner, root, Options("bf16", components=frozenset({"unet"})))
    unet = bundle.manifest.components["unet"]
    assert unet.precision == "bf16"
    assert {spec.dtype for spec in (*unet.inputs, *unet.outputs)} == {"float32"}
    types = _types(bundle.path(unet.graph))
    assert types[ir.DataType.BFLOAT16] > 50
    assert ir.DataType.FLOAT16 not in types
    from safetensors.torch import load_file

    name = "conv_in.weight"
    stored = ir.load(bundle.path(unet.graph)).graph.initializers[name].const_value
    source = load_file(pair.base / "unet" / "diffusion_pytorch_model.safetensors")[name]
    expected = source.bfloat16().float().numpy()
    np.testing.assert_array_equal(stored.numpy().astype(np.float32), expected)
    with open_bundle(bundle.root) as pipeline, pytest.raises(IncompatibleError, match="--fp16") as caught:
        list(pipeline.generate(Request("a red fox", steps=2, handoff=None, seed=0, width=32, height=32)))
    assert caught.value.exit_code == 3


def _overflowing_vae(folder: Path) -> AutoencoderKL:
    """Scale the input of a GroupNorm at the end of a decoder beyond fp16, which does not change the output."""
    vae = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        last = vae.decoder.up_blocks[-1].resnets[-1]
        last.conv1.weight *= 2.0**19
        last.conv1.bias *= 2.0**19
    vae.save_pretrained(folder)
    return vae


def test_mixed_decodes_latents_that_overflow_fp16(pairs: Callable[[str], Any], tmp_path: Path) -> None:
    base = Path(shutil.copytree(pairs("outline").base, tmp_path / "base"))
    vae = _overflowing_vae(base / "vae")
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents).sample.numpy()
    errors = {}
    for precision in ("fp16", "mixed", "fp32"):
        options = Options("fp16", precision, components=frozenset({"vae_decoder", "vae_encoder"}))
        bundle = export_bundle(base, None, tmp_path / precision, options)
        decoder = bundle.manifest.components["vae_decoder"]
        assert decoder.precision == precision
        assert bundle.manifest.components["vae_encoder"].precision == ("fp16" if precision == "fp16" else "fp32")
        # onnx's own evaluator rounds after every node; ONNX Runtime's CPU provider keeps fp32 between some.
        session = ReferenceEvaluator(str(bundle.path(decoder.graph)))
        dtype = np.float16 if precision == "fp16" else np.float32
        assert {spec.dtype for spec in (*decoder.inputs, *decoder.outputs)} == {np.dtype(dtype).name}
        with np.errstate(over="ignore", invalid="ignore"):
            (found,) = session.run(None, {"latent_sample": latents.numpy().astype(dtype)})
            errors[precision] = np.abs(found - expected).max()
        if precision == "mixed":
            types = _types(bundle.path(decoder.graph))
            assert types[ir.DataType.FLOAT16] > 10
            assert types[ir.DataType.FLOAT] > 10
    assert not np.isfinite(errors["fp16"])
    assert errors["fp32"] < 1e-4 < errors["mixed"] < 0.05


def test_the_older_opset_has_basic_operators_and_the_same_outputs(pairs: Callable[[str], Any], tmp_path: Path) -> None:
    pair = pairs("outline")
    bundle = export_bundle(pair.base, None, tmp_path / "out", Options("fp32", vae_precision="fp16", opset=20))
    for component in bundle.manifest.components.values():
        model = ir.load(bundle.path(component.graph))
        operators = {node.op_type for node in model.graph}
        assert operators & {"Attention", "GroupNormalization", "SplitToSequence", "SequenceAt", "Identity"} == set()
        assert model.opset_imports == {"": 20}
    finals = []
    for root in (pair.bundle, bundle.root):
        with open_bundle(root) as pipeline:
            list(pipeline.generate(Request("a red fox", steps=4, handoff=None, seed=1, width=32, height=48)))
            finals.append(pipeline.run.final)
    assert 0 <= np.abs(finals[0] - finals[1]).max() < 1e-4


def test_unknown_settings_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="--opset 19: choose from 20 to 23"):
        Options(opset=19)
    with pytest.raises(UsageError, match="--vae-precision int4"):
        Options(vae_precision="int4")  # type: ignore[arg-type]
