"""Scaled fp8 weights, against transformers' own arithmetic and ComfyUI's rule; and refused variants."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

from sdxl_trt.engines.errors import CorruptError, SdxlTrtError, SourceError
from sdxl_trt.export.checkpoints.checkpoint import Checkpoint, digest_tensors, open_checkpoint, resolve_names
from sdxl_trt.export.checkpoints.quantization import read_quantization, unquantized

State = dict[str, torch.Tensor]
Resolve = Callable[..., Checkpoint]
SHAPE = (300, 200)
WANTED = {"to_q.weight": SHAPE, "to_q.bias": (300,)}


def _fp8(shape: tuple[int, ...], dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(50).to(dtype)


def _numbers(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)).add(0.01) / 100


@pytest.fixture
def resolve(tmp_path: Path) -> Resolve:
    """Return a function that stores a linear layer with changes and resolves its two tensors; no warning is allowed."""

    def run(changes: State, metadata: dict[str, str] | None = None, block: tuple[int, int] | None = None) -> Checkpoint:
        tensors = {"to_q.weight": _fp8(SHAPE), "to_q.bias": torch.zeros(300)} | changes
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors", metadata)
        return resolve_names(open_checkpoint(tmp_path, "model", "", block), WANTED, "unet", pytest.fail)

    return run


def _weight(checkpoint: Checkpoint) -> torch.Tensor:
    return next(checkpoint.read(["to_q.weight"]))[1]


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale", "weight_scale_inv", "scale"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (300,), (300, 1), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_weight_is_multiplied_by_its_scale(
    resolve: Resolve, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    stored, scale = _fp8(SHAPE, dtype), _numbers(*shape)
    checkpoint = resolve({"to_q.weight": stored, f"to_q.{name}": scale})
    assert checkpoint.tensors["to_q.weight"].dtype == "F32"
    block = [128, 128] if shape == (3, 2) else None
    spread = scale[:, None] if shape == (300,) else scale
    expected = _dequantize_fp8_weight(stored.clone(), spread, block, torch.float32)
    assert torch.equal(_weight(checkpoint), expected)
    assert not torch.equal(expected, stored.float()), "an unscaled weight would pass this test"


def test_the_config_sets_the_block_size(resolve: Resolve) -> None:
    scale = _numbers(5, 7)
    expected = _dequantize_fp8_weight(_fp8(SHAPE), scale, [64, 32], torch.float32)
    assert torch.equal(_weight(resolve({"to_q.weight_scale_inv": scale}, block=(64, 32))), expected)
    with pytest.raises(SourceError, match=r"to_q\.weight_scale_inv of shape \[5, 7\] does not fit .* in any known way"):
        resolve({"to_q.weight_scale_inv": scale})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scale_may_be_stored_in_half_precision(resolve: Resolve, dtype: torch.dtype) -> None:
    scale = torch.tensor(0.0123, dtype=dtype)
    assert torch.equal(_weight(resolve({"to_q.weight_scale": scale})), _fp8(SHAPE).float() * scale.float())


def test_a_convolution_has_one_scale_or_one_for_each_channel(tmp_path: Path) -> None:
    for scale in (torch.tensor(0.25), _numbers(8), _numbers(8, 1, 1, 1)):
        weight = _fp8((8, 4, 3, 3))
        save_file({"conv.weight": weight, "conv.weight_scale": scale}, tmp_path / "model.safetensors")
        checkpoint = resolve_names(open_checkpoint(tmp_path, "model"), {"conv.weight": (8, 4, 3, 3)}, "x", pytest.fail)
        by_channel = scale.reshape(-1, 1, 1, 1)
        assert torch.equal(next(checkpoint.read(["conv.weight"]))[1], weight.float() * by_channel)


def test_weights_without_a_scale_are_unchanged(resolve: Resolve) -> None:
    checkpoint = resolve({})
    assert checkpoint.tensors["to_q.weight"].dtype == "F8_E4M3"
    assert torch.equal(_weight(checkpoint).view(torch.uint8), _fp8(SHAPE).view(torch.uint8))


def test_a_digest_covers_the_scaled_weight(resolve: Resolve) -> None:
    """An unchanged digest keeps the bundle's component, so another scale must change it."""
    digests = {
        digest_tensors(resolve(changes), WANTED)
        for changes in ({}, {"to_q.weight_scale": torch.tensor(0.5)}, {"to_q.weight_scale": torch.tensor(0.25)})
    }
    assert len(digests) == 3
    plain = {"to_q.weight": _fp8(SHAPE).float() * 0.5}
    assert digest_tensors(resolve(plain), WANTED) in digests


def test_a_scale_may_be_in_another_shard(tmp_path: Path) -> None:
    save_file({"to_q.weight": _fp8(SHAPE), "to_q.bias": torch.zeros(300)}, tmp_path / "a.safetensors")
    save_file({"to_q.weight_scale": torch.tensor(0.5)}, tmp_path / "b.safetensors")
    index = {"weight_map": {"to_q.weight": "a.safetensors", "to_q.weight_scale": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = resolve_names(open_checkpoint(tmp_path, "model"), WANTED, "unet", pytest.fail)
    assert torch.equal(_weight(checkpoint), _fp8(SHAPE).float() * 0.5)


def test_input_scales_do_not_change_weights(resolve: Resolve) -> None:
    """ComfyUI's scale_input is for rounding activations in its fp8 matrix product."""
    scale = {"to_q.scale_weight": torch.tensor(0.5), "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    one = resolve(scale | {"to_q.scale_input": torch.tensor(3.0)})
    assert torch.equal(_weight(one), _weight(resolve(scale)))


def _mark(**settings: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("form", ["float8_e4m3fn", "float8_e5m2"])
def test_layers_with_comfyuis_fp8_mark_are_scaled(resolve: Resolve, form: str) -> None:
    scale = {"to_q.weight_scale": torch.tensor(0.5)}
    mark = _mark(format=form, full_precision_matrix_mult=True)
    metadata = {"_quantization_metadata": json.dumps({"layers": {"to_q": {"format": form}}})}
    expected = _fp8(SHAPE).float() * 0.5
    assert torch.equal(_weight(resolve(scale | {"to_q.comfy_quant": mark})), expected)
    assert torch.equal(_weight(resolve(scale, metadata)), expected)


HALF = torch.tensor(0.5)
SCALE = {"to_q.weight_scale": HALF}
REFUSED: list[tuple[str, State, str]] = [
    ("two scales", SCALE | {"to_q.scale_weight": HALF}, r"two scales, to_q\.scale_weight and to_q\.weight_scale"),
    ("of a half weight", SCALE | {"to_q.weight": torch.ones(SHAPE).half()}, "which is stored as F16; only fp8"),
    ("of int8", SCALE | {"to_q.weight": torch.ones(SHAPE, dtype=torch.int8)}, "stored as I8, quantized"),
    ("of bytes", SCALE | {"to_q.weight": torch.ones(SHAPE, dtype=torch.uint8)}, "stored as U8, quantized"),
    ("MXFP8", {"to_q.weight_scale": torch.ones(300, 7, dtype=torch.uint8)}, "4- and 8-bit block formats"),
    ("of columns", {"to_q.weight_scale": _numbers(1, 200)}, "in any known way"),
    ("of groups", {"to_q.weight_scale": _numbers(300, 2)}, "in any known way"),
    ("of too few blocks", {"to_q.weight_scale": _numbers(2, 2)}, "in any known way"),
    ("NVFP4", SCALE | {"to_q.weight_scale_2": HALF}, r"\(NVFP4: it has to_q\.weight_scale_2\)"),
    ("a zero point", SCALE | {"to_q.weight_zero_point": HALF}, "a zero point"),
    ("of the output", SCALE | {"to_q.output_scale": HALF}, "would change the model's weights"),
    ("of the input alone", {"to_q.scale_input": HALF}, "would change the model's weights"),
    ("of a bias", {"to_q.bias_scale": HALF}, "would change the model's weights"),
    ("of nothing", {"gone.weight_scale": HALF}, "would change the model's weights"),
    ("missing beside a mark", {"scaled_fp8": torch.zeros(2)}, "has no scale"),
    ("missing beside a layer's mark", {"to_q.comfy_quant": _mark(format="float8_e4m3fn")}, "would change"),
    ("of the weight alone", SCALE | {"to_q.bias": torch.zeros(300).to(torch.float8_e4m3fn)}, "to_q.bias has no scale"),
    ("comfy int8", SCALE | {"to_q.comfy_quant": _mark(format="int8_tensorwise")}, r"quantized \(int8_tensorwise\)"),
    ("rotated", SCALE | {"to_q.comfy_quant": _mark(format="float8_e4m3fn", convrot=True)}, "with convrot"),
    ("no JSON", SCALE | {"to_q.comfy_quant": torch.zeros(3, dtype=torch.uint8)}, "is not JSON"),
    ("nf4", {"to_q.weight.absmax": HALF, "to_q.weight.quant_map": HALF}, "bitsandbytes"),
    ("nf4 state", {"to_q.weight.quant_state.bitsandbytes__nf4": HALF}, "bitsandbytes"),
    ("int8 of bitsandbytes", {"to_q.SCB": HALF}, "bitsandbytes"),
    ("SVDQuant", {"to_q.wscales": HALF, "to_q.proj_down": HALF}, "SVDQuant"),
    ("GPTQ", {"to_q.qweight": HALF, "to_q.scales": HALF}, "GPTQ or AWQ"),
    ("quanto", {"to_q.weight._data": HALF, "to_q.weight._scale": HALF}, "quanto"),
    ("packed", {"to_q.weight_packed": HALF}, "packed"),
    ("SmoothQuant", {"to_q.smooth_scale": HALF}, "would change the model's weights"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_uncertain_scales_are_refused(resolve: Resolve, changes: State, message: str) -> None:
    with pytest.raises(SdxlTrtError, match=message):
        resolve(changes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_scale_is_corrupt(resolve: Resolve, value: float) -> None:
    checkpoint = resolve({"to_q.weight_scale": torch.tensor(value)})
    with pytest.raises(CorruptError, match=r"to_q\.weight_scale holds NaN or infinite scales"):
        _weight(checkpoint)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [({"layers": {"to_q": {"format": "nvfp4"}}}, "quantized .nvfp4."), ({"layers": []}, "broken"), ([], "broken"),
     ({"layers": {"to_k": {"format": "float8_e4m3fn"}}}, "the header states that to_k is scaled fp8"),
     ({"layers": {"to_q": 7}}, "not a JSON object")],
)  # fmt: skip
def test_a_header_that_states_another_quantization_is_refused(resolve: Resolve, metadata: Any, message: str) -> None:
    with pytest.raises(SdxlTrtError, match=message):
        resolve(SCALE, {"_quantization_metadata": json.dumps(metadata)})


# Quantization settings in config.json.
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "block_structure": None}}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "block"),
    [({"quant_method": "fp8", "weight_block_size": [64, 32]}, (64, 32)), ({"quant_method": "fp8"}, (128, 128)),
     (COMPRESSED, (128, 128)), (None, None)],
)  # fmt: skip
def test_the_config_decides_how_scaled_fp8_is_read(settings: Any, block: Any) -> None:
    config = {"hidden_size": 8} | ({} if settings is None else {"quantization_config": settings})
    assert read_quantization(config, "unet") == block
    assert unquantized(config) == {"hidden_size": 8}, "the exported model is not quantized"


def test_a_config_that_states_fp8_requires_scales(resolve: Resolve) -> None:
    with pytest.raises(SourceError, match=r"to_q\.weight has no scale"):
        resolve({}, block=(128, 128))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized .bitsandbytes."),
     ({"quant_method": "torchao", "quant_type": "int8wo"}, "quantized .torchao, int8wo."),
     ({"quant_method": "gptq"}, "gptq"), ({}, "unnamed"), (7, "not a JSON object"),
     ({"quant_method": "fp8", "weight_block_size": [128]}, "expected two integers"),
     (COMPRESSED | {"format": "pack-quantized"}, "compressed-tensors, pack-quantized"),
     (COMPRESSED | {"transform_config": {"config_groups": {"u": 1}}}, "compressed-tensors"),
     (COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "compressed-tensors"),
     (COMPRESSED | {"config_groups": {"g": {"weights": {"num_bits": 8, "type": "int"}}}}, "compressed-tensors"),
     (COMPRESSED | {"config_groups": {}}, "compressed-tensors")],
)  # fmt: skip
def test_other_ways_of_quantizing_are_refused_by_name(settings: Any, message: str) -> None:
    with pytest.raises(SdxlTrtError, match=message):
        read_quantization({"quantization_config": settings}, "unet")
