"""LoRAs on ONNX Runtime and OpenVINO: patched at load, against torch's own sums; off again, all is as before."""

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sdxl_trt.engines.adapters.file import Lora, open_lora
from sdxl_trt.engines.adapters.scaled import ScaledLora
from sdxl_trt.engines.backends.mapped.patch import _to_bfloat16, plan_patch
from sdxl_trt.engines.backends.ort.engine import OrtEngine
from sdxl_trt.engines.backends.ov.engine import OvEngine
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.bundle.tensor_table import read_table
from sdxl_trt.engines.errors import CorruptError, IncompatibleError, SdxlTrtError, SourceError
from sdxl_trt.mini.embedded import bundle_path

PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
PROJECTION = "text_projection"
Write = Callable[..., Lora]


Make = Callable[[Bundle], OrtEngine | OvEngine]
MAKERS: dict[str, Make] = {
    "ort": lambda bundle: OrtEngine(bundle, "text_encoder"),
    "openvino": lambda bundle: OvEngine(bundle, "text_encoder", "fp32"),
}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def make(request: pytest.FixtureRequest) -> Make:
    """Return a function that makes an engine for the text encoder, on each library."""
    return request.param


@pytest.fixture(scope="module")
def mini() -> Bundle:
    return read_bundle(bundle_path())


def _modules(bundle: Bundle, name: str) -> dict[str, tuple[int, ...]]:
    """Return {module: shape} of a component's linear layers and convolutions."""
    return {
        key.removesuffix(".weight"): shape
        for key, shape in read_table(bundle, name).shapes.items()
        if key.endswith(".weight") and len(shape) in {2, 4} and "embeddings" not in key
    }


def _lora_of(bundle: Bundle, name: str, rank: int, seed: int, size: float = 0.1) -> dict[str, torch.Tensor]:
    """Return a LoRA in kohya's format for every linear layer and convolution of a component."""
    torch.manual_seed(seed)
    tensors = {}
    for module, (out, inner, *kernel) in _modules(bundle, name).items():
        key = PREFIXES[name] + module.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, inner, *kernel) * size
        tensors[f"{key}.lora_up.weight"] = torch.randn(out, rank, *(1 for _ in kernel)) * size
        tensors[f"{key}.alpha"] = torch.tensor(rank / 2)
    return tensors


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(tensors: dict[str, torch.Tensor], name: str = "style") -> Lora:
        save_file(tensors, tmp_path / f"{name}.safetensors")
        return open_lora(tmp_path / f"{name}.safetensors")

    return write


def _mapped(bundle: Bundle, name: str) -> mmap.mmap:
    with bundle.path(bundle.manifest.components[name].weights).open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _published(data: np.ndarray, record: Any) -> torch.Tensor:
    """Return a tensor of the weights file in its published shape, permuted by torch."""
    raw = data[record.offset : record.offset + record.nbytes].copy().view(record.dtype)
    stored = torch.from_numpy(raw.reshape(record.stored_shape))
    if record.permutation is None:
        return stored
    back = [record.permutation.index(axis) for axis in range(len(record.shape))]
    return stored.permute(back)


@pytest.mark.parametrize("name", ["unet", "text_encoder_2"])
def test_each_tensor_is_the_sum_and_all_others_keep_their_bytes(mini: Bundle, name: str, write: Write) -> None:
    first, second = (_lora_of(mini, name, rank, seed) for rank, seed in ((4, 1), (3, 2)))
    loras = [ScaledLora(write(first, "a"), 0.7), ScaledLora(write(second, "b"), -0.4)]
    weights, before = _mapped(mini, name), np.frombuffer(_mapped(mini, name), np.uint8)
    patch = plan_patch(mini, name, loras)
    patch.apply(weights)
    after = np.frombuffer(weights, np.uint8)
    changed = {f"{module}.weight" for module in _modules(mini, name)}
    assert {record.name for record in patch.records} == changed
    same = np.ones(len(before), bool)
    for record in read_table(mini, name).tensors:
        if record.name not in changed:
            continue
        assert record.offset is not None
        same[record.offset : record.offset + record.nbytes] = False
        key = PREFIXES[name] + record.name.removesuffix(".weight").replace(".", "_")
        expected = _published(before, record).float()
        for tensors, scale in ((first, 0.7), (second, -0.4)):
            down, up = (tensors[f"{key}.lora_{half}.weight"].flatten(1) for half in ("down", "up"))
            expected = expected + scale * 0.5 * (up @ down).reshape(expected.shape)
        found = _published(after, record)
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.float(), expected, rtol=5e-4, atol=1e-6)
    np.testing.assert_array_equal(before[same], after[same])
    assert patch.nbytes == np.count_nonzero(~same)


def _run_unet(bundle: Bundle, loras: list[ScaledLora], *, standard: bool) -> np.ndarray:
    engine = OrtEngine(bundle, "unet", standard=standard)
    rng = np.random.default_rng(0)
    sizes = {"rows": 2, "height": 8, "width": 12, "tokens": 77}
    engine.adapt(loras)
    engine.load()
    try:
        return engine.infer(
            {spec.name: rng.standard_normal([sizes.get(str(side), side) for side in spec.shape]).astype(spec.dtype)
             for spec in engine.component.inputs}, ["out_sample"],
        )["out_sample"].astype(np.float32)  # fmt: skip
    finally:
        engine.unload()


def test_convolutions_that_a_graph_computes_from_sums_of_their_weights_take_loras(mini: Bundle, write: Write) -> None:
    """The graph for CPUs sums the weights of an upsampler; the one for other backends reads them as they are."""
    lora = {key: value for key, value in _lora_of(mini, "unet", 4, 3, 0.3).items() if "upsamplers" in key}
    assert len(lora) == 6
    loras = [ScaledLora(write(lora), 1.0)]
    usual, summed = (_run_unet(mini, loras, standard=standard) for standard in (True, False))
    without = _run_unet(mini, [], standard=False)
    off = float(np.abs(summed - usual).max())
    assert off < 0.02 * float(np.abs(summed - without).max())
    assert off < 0.01


def _infer(engine: OrtEngine) -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, 400, (2, 77)).astype(np.int64)
    width = engine.component.input("embeddings").shape[1]
    none = {"embedding_index": np.zeros_like(ids), "embeddings": np.zeros((1, width), np.float16)}
    return engine.infer({"input_ids": ids, **none}, ["hidden_states.1"])["hidden_states.1"]


def test_loras_go_on_mix_and_off_again_bit_by_bit(make: Make, mini: Bundle, write: Write) -> None:
    one = ScaledLora(write(_lora_of(mini, "text_encoder", 4, 1), "a"), 0.8)
    other = ScaledLora(write(_lora_of(mini, "text_encoder", 4, 2), "b"), -0.5)
    engine = make(mini)
    found = []
    for loras in ([], [one], [one, other], [one], []):
        engine.adapt(loras)
        engine.load()
        found.append(_infer(engine))
    plain, alone, mixed, again, off = found
    np.testing.assert_array_equal(plain, off)
    np.testing.assert_array_equal(alone, again)
    assert np.abs(alone - plain).max() > 0.05
    assert np.abs(mixed - alone).max() > 0.05


def test_equal_loras_leave_a_loaded_engine_loaded(make: Make, mini: Bundle, write: Write) -> None:
    lora = write(_lora_of(mini, "text_encoder", 2, 1))
    engine = make(mini)
    engine.adapt([ScaledLora(lora, 0.5)])
    engine.load()
    assert engine._loaded
    engine.adapt([ScaledLora(open_lora(lora.path), 0.5)])
    assert engine._loaded
    engine.adapt([ScaledLora(lora, 0.6)])
    assert not engine._loaded


@pytest.mark.parametrize("damage", ["large", "changed", "gone"])
def test_a_faulty_lora_leaves_no_half_patched_engine(
    make: Make, mini: Bundle, write: Write, damage: str, tmp_path: Path
) -> None:
    tensors = _lora_of(mini, "text_encoder", 2, 1)
    lora = ScaledLora(write(tensors), 1e8 if damage == "large" else 1.0)
    engine = make(mini)
    engine.load()
    plain = _infer(engine)
    engine.adapt([lora])
    if damage == "changed":
        lora.lora.path.write_bytes(lora.lora.path.read_bytes()[:-100])
    elif damage == "gone":
        lora.lora.path.unlink()
    messages = {
        "changed": "changed while it was in use; run again",
        "large": r"makes text_model.*weight too large for fp16 at scale 100000000.0; lower", "gone": "reading",
    }  # fmt: skip
    with pytest.raises(SdxlTrtError, match=rf"style\.safetensors.*{messages[damage]}|{messages[damage]}") as caught:
        engine.load()
    assert "\n" not in str(caught.value)
    assert not engine._loaded
    assert engine._weights is None
    engine.adapt([])
    engine.load()
    np.testing.assert_array_equal(_infer(engine), plain)


def test_a_lora_of_another_model_leaves_the_engine_loaded(mini: Bundle, write: Write) -> None:
    tensors = {key: tensor[:, :-1].contiguous() if "down" in key else tensor
               for key, tensor in _lora_of(mini, "text_encoder", 2, 1).items()}  # fmt: skip
    engine = OrtEngine(mini, "text_encoder")
    engine.load()
    with pytest.raises(SourceError, match="LoRA for another model"):
        engine.adapt([ScaledLora(write(tensors), 1.0)])
    assert _infer(engine).shape[0] == 2


def test_tensors_that_the_graph_does_not_use_are_left_out(mini: Bundle, write: Write) -> None:
    """Trainers write LoRAs for all layers, and a graph ends before the encoder's last normalization."""
    norm = {"lora_te1_text_model_final_layer_norm.diff": torch.ones(48)}
    patch = plan_patch(mini, "text_encoder", [ScaledLora(write(norm), 1.0)])
    assert patch.changes.names == {"text_model.final_layer_norm.weight"}
    assert patch.records == ()


def test_what_takes_no_loras_says_so(mini: Bundle, write: Write) -> None:
    lora = ScaledLora(write(_lora_of(mini, "text_encoder", 2, 1)), 1.0)
    with pytest.raises(IncompatibleError, match="vae_decoder takes no LoRAs"):
        OrtEngine(mini, "vae_decoder").adapt([lora])
    engine = OrtEngine(mini, "text_encoder", "ort-tensorrt")
    engine.adapt([])
    with pytest.raises(IncompatibleError, match=r"text_encoder: ONNX Runtime's TensorRT compiles the weights.*slots"):
        engine.adapt([lora])


def test_a_bundle_without_the_table_is_refused(mini: Bundle, write: Write) -> None:
    encoder = msgspec.structs.replace(mini.manifest.components["text_encoder"], adapters=None)
    older = Bundle(mini.root, msgspec.structs.replace(mini.manifest, components={"text_encoder": encoder}))
    with pytest.raises(IncompatibleError, match="run export-engines again"):
        OrtEngine(older, "text_encoder").adapt([ScaledLora(write(_lora_of(mini, "text_encoder", 2, 1)), 1.0)])


def test_another_file_than_the_manifests_is_not_patched(mini: Bundle, write: Write, tmp_path: Path) -> None:
    component = mini.manifest.components["text_encoder"]
    for record in component.files:
        (tmp_path / record.file).parent.mkdir(exist_ok=True)
        (tmp_path / record.file).write_bytes(mini.path(record).read_bytes())
    raw = bytearray((tmp_path / component.weights.file).read_bytes())
    raw[1000] ^= 1
    (tmp_path / component.weights.file).write_bytes(raw)
    engine = OrtEngine(Bundle(tmp_path, mini.manifest), "text_encoder")
    engine.adapt([ScaledLora(write(_lora_of(mini, "text_encoder", 2, 1)), 1.0)])
    with pytest.raises(CorruptError, match="sha256 is not the manifest's"):
        engine.load()


def test_bf16_is_rounded_as_torch_rounds_it() -> None:
    numbers = torch.cat([torch.randn(4096) * 10.0**power for power in (-38, -3, 0, 30)])
    numbers = torch.cat([numbers, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 0.0, -0.0])])
    expected = numbers.bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(_to_bfloat16(numbers.numpy()), expected)
