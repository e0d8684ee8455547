"""Weights are written anew: chosen ones in 8 bits with their scales, all others bit by bit."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from sdxl_trt.engines.bundle import AdapterTable, TensorRecord
from sdxl_trt.export.eight_bit import store
from sdxl_trt.export.eight_bit.formats import unsigned_scale
from sdxl_trt.export.eight_bit.ranges import Ranges
from sdxl_trt.export.eight_bit.store import read_stored, write_eight_bit
from sdxl_trt.export.graph.weights import ALIGNMENT, LARGE, PAGE

SHAPES: dict[str, tuple[int, ...]] = {
    "norm.weight": (7,), "linear.weight": (32, 24), "linear.bias": (32,), "conv.weight": (8, 4, 3, 3),
    "conv.bias": (8,), "float.weight": (16, 8), "large.weight": (256, 1024),
}  # fmt: skip
LAYERS: Any = {
    "linear": SimpleNamespace(module="linear", kind="linear", axis=1),
    "large": SimpleNamespace(module="large", kind="linear", axis=1),
    "conv": SimpleNamespace(module="conv", kind="convolution", axis=0),
}
SPAN = (-1.5, 3.0)
DTYPES = {"float16": np.float16, "float32": np.float32}


@pytest.fixture(params=["float16", "float32"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, AdapterTable, dict[str, Any]]:
    """A folder with weights of one type, matrices transposed, its table, and its arrays as they are stored."""
    rng, dtype = np.random.default_rng(0), request.param
    arrays, records, content = {}, [], bytearray()
    for name, shape in SHAPES.items():
        permutation = (1, 0) if len(shape) == 2 else None
        array = rng.standard_normal(shape[::-1] if permutation else shape).astype(DTYPES[dtype])
        content += bytes(-len(content) % 64)
        records.append(TensorRecord(name=name, shape=shape, dtype=dtype, permutation=permutation, offset=len(content)))
        content += array.tobytes()
        arrays[name] = array
    records.append(TensorRecord(name="idle.weight", shape=(3, 3), dtype=dtype))
    folder = tmp_path / "floats"
    folder.mkdir()
    (folder / "weights.data").write_bytes(content)
    return folder, AdapterTable(tensors=tuple(records[::-1]), slots=()), arrays


def _ranges() -> Ranges:
    return Ranges("unet", {f"{module}.input": SPAN for module in LAYERS})


def _read(folder: Path, stored: Any) -> Any:
    return stored.tensor("any", folder).numpy()


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_chosen_weights_are_quantized_and_the_others_are_the_same_bits(
    scheme: Any, source: tuple[Path, AdapterTable, dict[str, Any]], tmp_path: Path
) -> None:
    folder, table, arrays = source
    out, progress = tmp_path / "out", list[int]()
    out.mkdir()
    found = write_eight_bit(table, folder, out, LAYERS, _ranges(), scheme, progress.append)
    content = (out / "weights.data").read_bytes()
    assert found.written.size == len(content)
    assert found.written.sha256 == hashlib.sha256(content).hexdigest()
    assert found.written.parameters == sum(array.size for array in arrays.values())
    assert found.tensors.keys() == arrays.keys()
    assert [record.name for record in found.written.tensors] == list(SHAPES)  # in the order of the source file
    for record in found.written.tensors:
        stored, exact = found.tensors[record.name], arrays[record.name]
        large = stored.tensor("any", out).nbytes >= LARGE
        assert stored.offset == record.offset
        assert stored.offset % (PAGE if large else ALIGNMENT) == 0
        assert (record.shape, record.stored_shape) == (SHAPES[record.name], exact.shape)
        value, module = _read(out, stored), record.name.removesuffix(".weight")
        if module not in LAYERS:
            assert value.tobytes() == exact.tobytes()
            assert record.dtype == exact.dtype.name
            continue
        assert value.dtype == (np.int8 if scheme == "int8" else ml_dtypes.float8_e4m3fn)
        assert record.dtype == ("int8" if scheme == "int8" else "float8e4m3fn")
        scale = _read(out, found.wide_scales[module])
        assert scale.dtype == np.float32
        shape = [1] * exact.ndim
        shape[LAYERS[module].axis] = -1
        error = np.abs(value.astype(np.float32) * scale.reshape(shape) - exact.astype(np.float32))
        step = 0.5 if scheme == "int8" else 16  # half of FP8's coarsest step
        assert (error <= scale.reshape(shape) * step * 1.001).all()
        narrow = _read(out, found.scales[module])
        assert narrow.dtype == exact.dtype
        assert np.array_equal(narrow.astype(np.float32), scale)
    assert sum(progress) == sum(_read(out, stored).nbytes for stored in found.tensors.values())
    assert "idle.weight" not in found.tensors


def test_a_convolutions_bias_is_int32_in_units_of_both_scales(
    source: tuple[Path, AdapterTable, dict[str, Any]], tmp_path: Path
) -> None:
    folder, table, arrays = source
    found = write_eight_bit(table, folder, tmp_path, LAYERS, _ranges(), "int8")
    assert list(found.biases) == ["conv"]
    bias, step = (_read(tmp_path, stored) for stored in found.biases["conv"])
    near, _ = unsigned_scale(SPAN)
    assert bias.dtype == np.int32
    assert np.array_equal(step, _read(tmp_path, found.wide_scales["conv"]) * near)
    assert (np.abs(bias * step.astype(np.float64) - arrays["conv.bias"]) <= step * 0.51).all()
    other = tmp_path / "fp8"
    other.mkdir()
    assert write_eight_bit(table, folder, other, LAYERS, _ranges(), "fp8").biases == {}


def test_half_of_a_scale_lies_where_half_of_the_vector_does(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32)
    (tmp_path / "weights.data").write_bytes(bytes(64) + values.tobytes())
    whole = store.Stored(64, ir.DataType.FLOAT, (6,))
    assert np.array_equal(_read(tmp_path, whole.part(0)), values[:3])
    assert np.array_equal(_read(tmp_path, whole.part(1)), values[3:])


def test_one_tensor_is_in_memory_at_a_time(
    source: tuple[Path, AdapterTable, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    folder, table, _ = source
    alive: list[weakref.ref[torch.Tensor]] = []

    def read(source: Path, record: TensorRecord) -> torch.Tensor:
        large = [tensor for ref in alive if (tensor := ref()) is not None and tensor.dim() > 1]
        assert len(large) <= 1  # the one that the loop's variable still names
        alive.append(weakref.ref(tensor := read_stored(source, record)))
        return tensor

    monkeypatch.setattr(store, "read_stored", read)
    write_eight_bit(table, folder, tmp_path, LAYERS, _ranges(), "int8")
    assert len(alive) == len(SHAPES) + 1  # and the bias of the convolution


def test_a_full_disk_is_an_error_of_one_line(source: tuple[Path, AdapterTable, dict[str, Any]], tmp_path: Path) -> None:
    from sdxl_trt.engines.errors import SdxlTrtError

    folder, table, _ = source
    with pytest.raises(SdxlTrtError, match=r"writing .*weights\.data"):
        write_eight_bit(table, folder, tmp_path / "missing", LAYERS, _ranges(), "int8")
