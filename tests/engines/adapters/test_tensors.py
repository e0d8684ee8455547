"""Tensors of safetensors files, read with numpy alone, against torch's own decoding of every dtype."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_trt.engines.adapters.tensors import StoredTensor, open_tensors, read_raw, read_tensor
from sdxl_trt.engines.errors import CorruptError, SdxlTrtError, SourceError

BYTES = torch.arange(256, dtype=torch.uint8)
WORDS = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
EVERY = {
    "e4m3": BYTES.clone().view(torch.float8_e4m3fn), "e5m2": BYTES.view(torch.float8_e5m2),
    "bf16": WORDS.clone().view(torch.bfloat16).reshape(256, 256), "fp16": WORDS.view(torch.float16),
}  # fmt: skip


def test_every_number_of_the_short_dtypes_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    save_file(EVERY, tmp_path / "a.safetensors")
    file = open_tensors(tmp_path / "a.safetensors")
    for key, tensor in EVERY.items():
        values = read_tensor(file.tensors[key]).astype(np.float32)
        assert values.shape == tuple(tensor.shape)
        np.testing.assert_array_equal(values, tensor.float().numpy(), err_msg=key)


def test_tensors_are_found_whatever_their_order_dtype_and_size(tmp_path: Path) -> None:
    tensors = {
        "z": torch.tensor(2.5, dtype=torch.float64), "a": torch.ones(3, 5), "none": torch.ones(0, 4),
        "b": torch.arange(7, dtype=torch.int64), "c": torch.tensor([True, False]), "d": torch.ones(2, 2).half() * 3,
        "é\n": torch.arange(6, dtype=torch.int8).reshape(2, 3), "e": torch.ones(4).bfloat16() * -0.5,
    }  # fmt: skip
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {"note": "ä"})
    file = open_tensors(path)
    assert file.metadata == {"note": "ä"}
    assert file.tensors.keys() == tensors.keys()
    for key, tensor in load_file(path).items():
        np.testing.assert_array_equal(read_tensor(file.tensors[key]), tensor.double().numpy(), err_msg=key)


def test_values_belong_to_the_caller(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "a.safetensors")
    info = open_tensors(tmp_path / "a.safetensors").tensors["a"]
    read_tensor(info)[:] = 7
    assert read_tensor(info).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("change", ["shorter", "newer", "gone"])
def test_a_file_that_changes_after_opening_is_noticed(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(400)}, path)
    info = open_tensors(path).tensors["a"]
    if change == "gone":
        path.unlink()
    elif change == "newer":
        os.utime(path, ns=(1, 1))
    else:
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SdxlTrtError, match=r"a\.safetensors") as caught:
        read_raw(info)
    assert "\n" not in str(caught.value)
    assert change == "gone" or "changed while it was in use; run again" in str(caught.value)


def test_a_tensor_beyond_the_end_of_its_file_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(10))
    with pytest.raises(CorruptError, match="changed while it was in use"):
        read_raw(StoredTensor(tmp_path / "a", "a", (4,), "F32", offset=0))


def test_a_dtype_without_values_here_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(8))
    with pytest.raises(SourceError, match="'a' is F8_E8M0, which is not supported"):
        read_tensor(StoredTensor(tmp_path / "a", "a", (4,), "F8_E8M0"))


def test_a_file_of_more_tensors_than_any_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdxl_trt.engines.adapters.tensors._MOST_TENSORS", 3)
    path = tmp_path / "a.safetensors"
    save_file({str(number): torch.ones(1) for number in range(3)}, path)
    assert len(open_tensors(path).tensors) == 3
    save_file({str(number): torch.ones(1) for number in range(4)}, path)
    with pytest.raises(SourceError, match=r"a\.safetensors: holds 4 tensors, expected at most 3; use another file"):
        open_tensors(path)
