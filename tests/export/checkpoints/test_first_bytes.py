"""Files named .safetensors of another format: the error names the format and the remedy."""

import io
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdxl_trt.engines.adapters.file import open_lora
from sdxl_trt.engines.errors import CorruptError, SdxlTrtError, SourceError
from sdxl_trt.export.checkpoints.checkpoint import open_checkpoint, open_file
from sdxl_trt.export.sources.source import open_checkpoint_file, open_source, open_vae
from sdxl_trt.export.sources.unets import open_unet


def _torch_file(*, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(1)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.safetensors", b"x")
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 6938078334\n"
KINDS: dict[str, tuple[bytes, type[SdxlTrtError], str]] = {
    "GGUF": (b"GGUF" + struct.pack("<I", 3) + bytes(64), SourceError, "is a GGUF file.*get the model as .safetensors"),
    "git-lfs": (POINTER, SourceError, "is a git-lfs pointer.*run 'git lfs pull'"),
    "HTML": (b"<!DOCTYPE html><html><head><title>Log in", SourceError, "is a web page.*download the file again"),
    "HTML after a mark": (b"\xef\xbb\xbf \n<HTML>\n<body>", SourceError, "is a web page"),
    "JSON": (b'{"error": "Unauthorized"}', SourceError, "is JSON text, probably an error message"),
    "zipped pickle": (_torch_file(zipped=True), SourceError, "is pickled, which can run code"),
    "old pickle": (_torch_file(zipped=False), SourceError, "is pickled, which can run code"),
    "zip": (_zip(), SourceError, "is a zip archive"),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), SourceError, "is a gzip archive; unpack it"),
    "empty": (b"", CorruptError, "the file is empty.; download it again"),
    "noise": (bytes(range(1, 200)), CorruptError, "broken safetensors .*; download it again"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_format_is_named_in_the_error(tmp_path: Path, kind: str) -> None:
    content, error, message = KINDS[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for opened in (
        lambda: open_source(path, "base"), lambda: open_source(path, "refiner"), lambda: open_vae(path),
        lambda: open_unet(path), lambda: open_lora(path), lambda: open_checkpoint(tmp_path, "model"),
    ):  # fmt: skip
        with pytest.raises(error, match=rf"model\.safetensors: .*{message}|model\.safetensors: {message}"):
            opened()


@pytest.mark.parametrize("kind", ["git-lfs", "HTML", "empty"])
@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_errors_for_a_folder_name_the_file(pairs: Callable[[str], Any], tmp_path: Path, kind: str, file: str) -> None:
    content, error, _ = KINDS[kind]
    shutil.copytree(pairs("outline").base, tmp_path / "base")
    (tmp_path / "base" / file).write_bytes(content)
    source = open_source(tmp_path / "base", "base")
    with pytest.raises(error, match=file.rpartition("/")[2]):
        source.models[file.partition("/")[0]].checkpoint()


def test_an_index_may_be_a_git_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(POINTER)
    with pytest.raises(SourceError, match=r"index\.json: is a git-lfs pointer"):
        open_checkpoint(tmp_path, "model")


@pytest.mark.parametrize("lost", [1, 7, 400, 4096])
def test_the_error_for_a_truncated_file_states_its_size(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2048)}, path)
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(CorruptError, match=rf"truncated: it has {whole - lost} of {whole} bytes.*download it again"):
        open_file(path)


def test_safetensors_are_read_whatever_the_name_of_the_file(made: Any, single: Any) -> None:
    root, _, _ = made("outline", "base")
    path = single().rename(single().with_suffix(".ckpt"))
    source = open_checkpoint_file(path, "base", configs=root)
    assert len(source.models["unet"].checkpoint().tensors) > 0
    assert open_source(path, "base").name == "base.ckpt"


@pytest.mark.parametrize("length", [0x7B, 0x5B, 0x8B1F, 0x0280, 0x0380, 0x3C20])
def test_a_header_may_be_of_any_length(tmp_path: Path, length: int) -> None:
    """The first bytes are a number, which may look like another format's magic number."""
    entry = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = entry + b" " * (length - len(entry) - 1) + b"}"
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + header + bytes(4))
    assert list(open_file(tmp_path / "x.safetensors").tensors) == ["a"]
