"""Embedding files: the three layouts that are read, and one line for every other file."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from sdxl_trt.engines.errors import CorruptError, SdxlTrtError, SourceError, UsageError
from sdxl_trt.runtime.adapters.embedding_file import MAX_BYTES, read_embedding

RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.standard_normal((3, 768), dtype=np.float32), RNG.standard_normal((3, 1280), dtype=np.float32)


def _saved(path: Path, **tensors: Any) -> Path:
    save_file(tensors, path)
    return path


def _raw(path: Path, entries: dict[str, Any], data: bytes) -> Path:
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_sdxls_two_encoders_are_read(tmp_path: Path) -> None:
    found = read_embedding(_saved(tmp_path / "ink.safetensors", clip_g=SECOND, clip_l=FIRST))
    assert found.name == "ink.safetensors"
    for encoder, expected in (("clip_l", FIRST), ("clip_g", SECOND)):
        vectors = found.vectors(encoder, expected.shape[1])
        assert vectors is not None
        np.testing.assert_array_equal(vectors, expected)
        assert found.vectors(encoder, 1024) is None


@pytest.mark.parametrize("key", ["emb_params", "<ink>", "*"])
def test_a_single_tensor_is_for_the_encoder_of_its_width(key: str, tmp_path: Path) -> None:
    found = read_embedding(_saved(tmp_path / "a.safetensors", **{key: SECOND}))
    assert found.vectors("clip_l", 768) is None
    np.testing.assert_array_equal(found.vectors("clip_g", 1280), SECOND)


def test_a_single_vector_may_lack_the_first_axis(tmp_path: Path) -> None:
    found = read_embedding(_saved(tmp_path / "a.safetensors", clip_l=FIRST[0], clip_g=SECOND[0]))
    np.testing.assert_array_equal(found.vectors("clip_l", 768), FIRST[:1])


def test_an_encoder_without_vectors_finds_the_files_first_as_in_comfyui(tmp_path: Path) -> None:
    found = read_embedding(_saved(tmp_path / "a.safetensors", clip_g=SECOND))
    np.testing.assert_array_equal(found.found_by("clip_l"), SECOND)
    assert found.vectors("clip_l", 768) is None


def test_half_precisions_are_exact_in_fp32(tmp_path: Path) -> None:
    half = FIRST.astype(np.float16)
    np.testing.assert_array_equal(read_embedding(_saved(tmp_path / "h.safetensors", x=half)).tensors[""], half)
    bits = (FIRST.view(np.uint32) >> 16).astype("<u2")
    entry = {"dtype": "BF16", "shape": list(FIRST.shape), "data_offsets": [0, bits.nbytes]}
    found = read_embedding(_raw(tmp_path / "b.safetensors", {"clip_l": entry}, bits.tobytes()))
    np.testing.assert_array_equal(found.tensors["clip_l"], (bits.astype(np.uint32) << 16).view(np.float32))


def test_files_of_equal_content_are_equal(tmp_path: Path) -> None:
    one, two = (read_embedding(_saved(tmp_path / name, clip_l=FIRST)) for name in ("a.safetensors", "b.safetensors"))
    other = read_embedding(_saved(tmp_path / "c.safetensors", clip_l=FIRST + 1))
    assert one == two != other
    assert len({one, two, other}) == 2


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    before = read_embedding(_saved(path, clip_l=FIRST))
    assert read_embedding(path) is before
    assert read_embedding(_saved(path, clip_l=FIRST[:2])) != before


def _nan() -> np.ndarray:
    values = FIRST.copy()
    values[1, 7] = np.nan
    return values


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": ({"clip_l": _nan()}, "'clip_l' holds NaN or infinity"),
    "beyond float32": ({"clip_l": np.full((1, 768), 1e300)}, "'clip_l' holds NaN or infinity"),
    "a third encoder": ({"clip_l": FIRST, "clip_g": SECOND, "t5xxl": SECOND}, "also holds 't5xxl', so it was made for"),
    "a LoRA": ({f"lora_unet_{i}.alpha": FIRST for i in range(9)}, "holds 9 tensors (lora_unet_0.alpha"),
    "no tensors": ({}, "holds 0 tensors (nothing)"),
    "whole numbers": ({"x": np.zeros((2, 768), np.int32)}, "'x' is I32 [2, 768], but an embedding is floats"),
    "three axes": ({"x": np.zeros((2, 3, 768), np.float32)}, "'x' is F32 [2, 3, 768]"),
    "a number": ({"x": np.zeros((), np.float32)}, "'x' is F32 []"),
    "no vectors": ({"x": np.zeros((0, 768), np.float32)}, "has shape [0, 768]; an embedding has 1 to 248 vectors"),
    "too many vectors": ({"x": np.zeros((249, 8), np.float32)}, "has shape [249, 8]; an embedding has 1 to 248"),
    "no width": ({"x": np.zeros((1, 0), np.float32)}, "has shape [1, 0]"),
    "different counts": ({"clip_l": FIRST, "clip_g": SECOND[:2]}, "holds 3 for clip_l and 2 for clip_g"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_contents_are_refused_in_a_line(name: str, tmp_path: Path) -> None:
    tensors, message = REFUSED[name]
    path = _saved(tmp_path / "a.safetensors", **tensors)
    with pytest.raises(SourceError) as raised:
        read_embedding(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_large_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.touch()
    os.truncate(path, MAX_BYTES + 1)  # its header is broken, which nobody reads
    with pytest.raises(SourceError, match="is larger than 16 MiB, so not an embedding of SDXL"):
        read_embedding(path)


def test_pipes_and_folders_are_refused_without_opening_them(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening it would wait for ever
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(UsageError, match=f"{name}.safetensors: is not a file; give an embedding"):
            read_embedding(tmp_path / f"{name}.safetensors")


def test_pickled_and_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for content, error, message in (
        (b"\x80\x02}q\x00X\x0f\x00\x00\x00string_to_param", SourceError, "is pickled"),
        (b"PK\x03\x04" + b"\0" * 99, SourceError, "is pickled"),
        (b"", CorruptError, "the file is empty"),
        (save({"clip_l": FIRST})[:-100], CorruptError, "truncated"),
    ):
        path.write_bytes(content)
        with pytest.raises(error, match=message):
            read_embedding(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True, max_examples=60)
@given(place=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 3))
def test_any_damage_gives_vectors_or_one_line(place: int, byte: int, cut: int, tmp_path: Path) -> None:
    content = bytearray(save({"clip_l": FIRST[:, :24].copy(), "clip_g": SECOND[:, :32].copy()}))
    content[place % len(content)] = byte
    path = tmp_path / "a.safetensors"
    path.write_bytes(content[: len(content) - 100 * cut])
    message = ""
    try:
        found = read_embedding(path)
        assert all(np.isfinite(values).all() for values in found.tensors.values())
    except SdxlTrtError as exc:
        message = str(exc)
    assert "\n" not in message
