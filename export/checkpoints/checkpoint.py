"""Checkpoints: names, shapes and dtypes are read on opening, tensors later, one at a time."""

__all__ = [
    "Checkpoint",
    "TensorInfo",
    "digest_tensors",
    "open_checkpoint",
    "open_file",
    "resolve_names",
]

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from sdxl_trt.engines import CorruptError, explain_os_error
from sdxl_trt.engines.adapters import check_first_bytes, explain_damage
from sdxl_trt.engines.host import contained, require_utf8
from sdxl_trt.export.checkpoints.fp8_scales import FP8, find_scales
from sdxl_trt.export.checkpoints.leftovers import left_out
from sdxl_trt.export.checkpoints.quantization import check_header, check_layer
from sdxl_trt.export.checkpoints.tensor_info import Scale, TensorInfo
from sdxl_trt.export.checkpoints.weight_files import find_weights

# Every touched page of a mapped file counts as resident, so the file is mapped anew after this many bytes.
REMAP_BYTES = 256 << 20
_FLOATS = ("F64", "F32", "F16", "BF16", *FP8)


class Checkpoint:
    """A model's tensors in one or several safetensors files, read only on request.

    `metadata` is the metadata of the files' headers. `block` is the size of the blocks in which fp8 weights are
    scaled, if a config states one.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str] | None = None,
        block: tuple[int, int] | None = None,
    ) -> None:
        self.tensors = dict(tensors)
        self.metadata = dict(metadata or {})
        self.block = block

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) in the given order, holding one tensor and one mapped file at a time."""
        open_file: Path | None = None
        handle = None
        budget = 0
        for name in names:
            info = self.tensors[name]
            try:
                if handle is None or info.file != open_file or budget < 0:
                    handle = safe_open(info.file, framework="pt")
                    open_file, budget = info.file, REMAP_BYTES
                tensor = _load(handle, info)
            except SafetensorError as exc:
                raise explain_damage(info.file, exc) from exc
            except OSError as exc:
                raise explain_os_error(exc, f"reading {info.file}") from exc
            budget -= tensor.nbytes
            yield name, tensor

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """Return `names` in the order of their bytes on disk, the fastest order to read them."""

        def place(name: str) -> tuple[str, int, int]:
            info = self.tensors[name]
            return str(info.file), info.position, info.rows[0] if info.rows else 0

        return sorted(names, key=place)


def _load(handle: Any, info: TensorInfo) -> torch.Tensor:
    stored = handle.get_tensor(info.key) if info.rows is None else handle.get_slice(info.key)[slice(*info.rows)]
    tensor: torch.Tensor = stored
    if info.scale is not None:
        tensor = info.scale.multiply(stored, _numbers(handle, info.file, info.scale))
    return tensor.T.contiguous() if info.transposed else tensor


def _numbers(handle: Any, file: Path, scale: Scale) -> torch.Tensor:
    """Return the stored values of a scale, which may be in another shard than its weight."""
    if scale.file == file:
        return cast("torch.Tensor", handle.get_tensor(scale.key))
    with safe_open(scale.file, framework="pt") as other:
        return cast("torch.Tensor", other.get_tensor(scale.key))


def open_checkpoint(folder: Path, stem: str, variant: str = "", block: tuple[int, int] | None = None) -> Checkpoint:
    """Open the safetensors of a component folder: one file ``<stem>.safetensors``, or shards with their index.

    If the folder has the `variant` ("fp16"), it is preferred to the plain files; `block` is the block size that the
    config states for scaled fp8 weights. Raises SourceError if the folder has no weights, only pickled ones, or
    weights quantized in another way; CorruptError for broken files.
    """
    try:
        names = [path.name for path in folder.iterdir() if path.is_file()]
    except OSError as exc:
        raise explain_os_error(exc, f"reading {folder}") from exc
    entry = folder / find_weights(names, stem, str(folder), variant)
    tensors, metadata = _read_headers(_shards(folder, entry) if entry.suffix == ".json" else [entry])
    check_header(tensors, metadata, str(folder))
    return Checkpoint(tensors, metadata, block)


def open_file(path: Path) -> Checkpoint:
    """Open one safetensors file, whatever its name.

    Raises CorruptError if it is broken, SourceError if it is of another format, UsageError if it cannot be read.
    """
    return Checkpoint(*_read_headers([path]))


def _shards(folder: Path, index: Path) -> list[Path]:
    raw = b""
    try:
        raw = index.read_bytes()
        names = set(json.loads(raw)["weight_map"].values())
        return [_inside(folder, str(name)) for name in sorted(names)]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OSError) as exc:
        if raw and not raw.lstrip().startswith((b"{", b"[")):
            check_first_bytes(index)
        raise CorruptError(f"{index}: not a safetensors index ({exc}); download the model again") from exc


def _inside(folder: Path, name: str) -> Path:
    if "/" in name or not name.endswith(".safetensors"):
        raise CorruptError(f"{folder}: index names {name!r}, which is not a safetensors file beside it")
    # The files of a hub cache are links, so a link is followed here; its name was checked above.
    path = folder / name if (folder / name).is_symlink() else contained(folder, name)
    if not path.is_file():
        raise CorruptError(f"{path}: listed in the index but missing; download the model again")
    return path


def _read_headers(files: Iterable[Path]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file in files:
        require_utf8(file, "safetensors")
        check_first_bytes(file)
        try:
            with safe_open(file, framework="pt") as handle:
                metadata |= handle.metadata() or {}
                for position, key in enumerate(handle.offset_keys()):
                    if key in tensors:
                        raise CorruptError(f"{file}: {key} is also in {tensors[key].file.name}; download the model"
                                           " again")  # fmt: skip
                    part = handle.get_slice(key)
                    shape, dtype = tuple(part.get_shape()), part.get_dtype()
                    tensors[key] = TensorInfo(file, key, shape, dtype, position=position)
        except SafetensorError as exc:
            raise explain_damage(file, exc) from exc
        except OSError as exc:
            raise explain_os_error(exc, f"reading {file}") from exc
    return tensors, metadata


def _spellings(name: str) -> Iterator[str]:
    """Yield the names under which checkpoints store the tensor published as `name`, oldest last."""
    yield name
    if name.startswith("text_model."):
        yield name.removeprefix("text_model.")
    legacy = name
    for new, old in (
        (".to_q.", ".query."),
        (".to_k.", ".key."),
        (".to_v.", ".value."),
        (".to_out.0.", ".proj_attn."),
    ):
        legacy = legacy.replace(new, old)
    if legacy != name:
        yield legacy


def resolve_names(
    checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]], where: str, warn: Callable[[str], None]
) -> Checkpoint:
    """Return `checkpoint` under the published names, the keys of `wanted`, which maps them to shapes.

    Accepts CLIP keys with and without ``text_model.``, and the attention names of older autoencoders (whose
    weights may have two trailing dimensions of 1). Scaled fp8 weights are multiplied by their scales. Calls `warn` for
    extra tensors, except those that published files are known to contain. Raises CorruptError for missing, misshapen
    and quantized tensors; SourceError for extra tensors that would change the tensors in use, and for scales of
    uncertain meaning.
    """
    stored: dict[str, str] = {}
    found: dict[str, TensorInfo] = {}
    for name, shape in wanted.items():
        spelled = next((spelling for spelling in _spellings(name) if spelling in checkpoint.tensors), None)
        if spelled is None:
            raise CorruptError(f"{where}: tensor {name} is missing; the checkpoint is incomplete or for another model")
        found[name] = _checked(checkpoint.tensors[spelled], name, shape, where)
        stored[name] = spelled
    scales, consumed = find_scales(checkpoint.tensors, stored.values(), where, checkpoint.block)
    for mark, tensor in checkpoint.read(name for name in consumed if name.endswith(".comfy_quant")):
        check_layer(bytes(tensor.flatten().to(torch.uint8).tolist()), mark, where)
    for name, spelled in stored.items():
        if spelled in scales:
            found[name] = replace(found[name], scale=scales[spelled], dtype="F32")
    used = set(stored.values())
    extra = left_out(checkpoint.tensors.keys() - used - consumed, used, where)
    if extra:
        warn(f"{where}: ignored {len(extra)} tensors that the model does not use, for example {extra[0]}")
    return Checkpoint(found, checkpoint.metadata)


def _checked(info: TensorInfo, name: str, shape: tuple[int, ...], where: str) -> TensorInfo:
    if info.shape not in (shape, (*shape, 1, 1)):
        raise CorruptError(f"{where}: tensor {name} has shape {list(info.shape)}, but the config expects"
                           f" {list(shape)}; config and weights belong to different models")  # fmt: skip
    if info.dtype not in _FLOATS:
        raise CorruptError(f"{where}: tensor {name} is stored as {info.dtype}, quantized; give the model in fp16 or"
                           " fp32")  # fmt: skip
    return replace(info, shape=shape)


def digest_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """Return a sha256 over (name, dtype, shape, bytes) of the tensors `names`, computed in constant memory."""
    digest = hashlib.sha256()
    for name, tensor in checkpoint.read(sorted(names)):
        info = checkpoint.tensors[name]
        digest.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
