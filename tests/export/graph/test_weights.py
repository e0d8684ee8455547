"""Weights are streamed, cast, permuted and checked; damaged ones never get into a bundle."""

import errno
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

from sdxl_trt.engines.errors import CorruptError, ResourceError
from sdxl_trt.export.checkpoints.checkpoint import Checkpoint, TensorInfo, open_checkpoint, resolve_names
from sdxl_trt.export.graph.weights import WEIGHTS_FILE, WrittenWeights, write_weights

Tensors = dict[str, torch.Tensor]
TYPES = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16}


def _model(checkpoint: Checkpoint, dtype: torch.dtype, permutations: dict[str, tuple[int, ...]]) -> ir.Model:
    """Return a model whose initializers have types and shapes, but no values."""
    values = []
    for name, info in checkpoint.tensors.items():
        shape = [info.shape[axis] for axis in permutations[name]] if name in permutations else info.shape
        values.append(ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(TYPES[dtype])))
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 23})
    return ir.Model(graph, ir_version=10)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., tuple[ir.Model, WrittenWeights]]:
    """Return a function that stores tensors, opens them as a checkpoint and writes them as weights."""

    def run(
        tensors: Tensors, dtype: torch.dtype = torch.float32, permutations: dict[str, tuple[int, ...]] | None = None
    ) -> tuple[ir.Model, WrittenWeights]:
        save_file(tensors, tmp_path / "model.safetensors")
        checkpoint = open_checkpoint(tmp_path, "model")
        model = _model(checkpoint, dtype, permutations or {})
        names = {name: name for name in checkpoint.tensors}
        return model, write_weights(model, checkpoint, names, permutations or {}, tmp_path)

    return run


def _read(model: ir.Model, name: str) -> torch.Tensor:
    return torch.from_numpy(model.graph.initializers[name].const_value.numpy().copy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_are_cast(write, tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5, dtype=stored),
        "a": torch.randn(7, dtype=stored),
        "c": torch.tensor(2.0).to(stored),
    }
    model, written = write(tensors, dtype)
    for name, tensor in tensors.items():
        assert torch.equal(_read(model, name), tensor.to(dtype))
    content = (tmp_path / WEIGHTS_FILE).read_bytes()
    assert (written.size, written.parameters) == (len(content), 15 + 7 + 1)
    assert written.sha256 == hashlib.sha256(content).hexdigest()


def test_offsets_are_aligned_and_large_tensors_start_on_a_page(write) -> None:
    tensors = {"a": torch.ones(3), "b": torch.ones(1 << 18), "c": torch.ones(5), "d": torch.ones(1 << 19)}
    model, _ = write(tensors)
    offsets = {name: model.graph.initializers[name].const_value.offset for name in tensors}
    assert all(offset % 64 == 0 for offset in offsets.values())
    assert [offsets[name] % 4096 for name in "bd"] == [0, 0]
    spans = sorted((offsets[name], offsets[name] + tensors[name].nbytes) for name in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_a_permutation_is_stored(write) -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    model, _ = write({"w": tensor}, permutations={"w": (2, 0, 1)})
    assert torch.equal(_read(model, "w"), tensor.permute(2, 0, 1))


def test_a_1x1_convolution_is_stored_as_a_matrix(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3, 1, 1)
    save_file({"v.query.weight": tensor}, tmp_path / "model.safetensors")
    wanted = {"v.to_q.weight": (2, 3)}
    checkpoint = resolve_names(open_checkpoint(tmp_path, "model"), wanted, "vae", pytest.fail)
    model = _model(checkpoint, torch.float32, {})
    write_weights(model, checkpoint, {"v.to_q.weight": "v.to_q.weight"}, {}, tmp_path)
    assert torch.equal(_read(model, "v.to_q.weight"), tensor.reshape(2, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_is_refused(write, value: float, stored: torch.dtype, dtype: torch.dtype) -> None:
    tensor = torch.ones(100, dtype=stored)
    tensor[57] = value
    with pytest.raises(CorruptError, match="bad holds NaN or infinite weights; the checkpoint is damaged") as caught:
        write({"good": torch.ones(2), "bad": tensor}, dtype)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_error_for_fp16_overflow_names_the_remedy(write, stored: torch.dtype) -> None:
    tensors = {"big": torch.tensor([1.0, 7e4]).to(stored)}
    with pytest.raises(CorruptError, match="big has weights beyond fp16's range; export with --fp32"):
        write(tensors, torch.float16)
    model, _ = write(tensors, torch.float32)
    assert torch.equal(_read(model, "big"), tensors["big"].float())


def test_the_largest_fp16_number_does_not_overflow(write) -> None:
    model, _ = write({"w": torch.tensor([65504.0, -65504.0])}, torch.float16)
    assert _read(model, "w").tolist() == [65504, -65504]


def test_progress_is_reported_per_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4), "b": torch.ones(2, dtype=torch.float16)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path, "model")
    sizes: list[int] = []
    model = _model(checkpoint, torch.float32, {})
    write_weights(model, checkpoint, {"a": "a", "b": "b"}, {}, tmp_path, sizes.append)
    assert sizes == [16, 8]  # bytes as written, which take the time and the disk


def test_the_same_weights_make_the_same_bytes_from_shards(tmp_path: Path, write) -> None:
    """The file is in the order of shards and names, not of the graph."""
    tensors = {name: torch.full((3,), float(i)) for i, name in enumerate("dacb")}
    _, once = write(tensors)
    _, again = write(dict(reversed(tensors.items())))
    assert once == again


def test_a_full_disk_is_a_resource_error(write, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sdxl_trt.export.graph.weights.WeightsWriter._write", full)
    with pytest.raises(ResourceError, match=rf"writing .*{WEIGHTS_FILE}"):
        write({"a": torch.ones(2)})


def test_a_missing_tensor_is_corrupt(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint({"b": TensorInfo(tmp_path / "model.safetensors", "b", (2,), "F32")})
    model = _model(checkpoint, torch.float32, {})
    with pytest.raises(CorruptError, match="broken safetensors"):
        write_weights(model, checkpoint, {"b": "b"}, {}, tmp_path)
