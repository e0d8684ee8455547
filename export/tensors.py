"""Checkpoints as names, shapes and dtypes first, and tensors one at a time later."""

__all__ = [
    "Checkpoint",
    "TensorInfo",
    "digest_tensors",
    "known_extra",
    "open_checkpoint",
    "open_file",
    "resolve_names",
]

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sdxl_trt.engines.errors import CorruptError, explain_os_error
from sdxl_trt.engines.files import contained
from sdxl_trt.export.weight_files import find_weights

# A mapped file counts as resident once its pages are touched: the mapping is renewed after this many bytes.
REMAP_BYTES = 256 << 20
# What published checkpoints carry and no model reads: buffers that it computes for itself, CLIP's logit scale and
# the first encoder's projection, averaged weights, and the training's schedule, loss and flags.
_KNOWN_EXTRA = re.compile(
    r"(.+\.)?(position_ids|logit_scale|text_projection|text_projection\.weight)"
    r"|(model_ema|denoiser|loss|first_stage_model\.loss|first_stage_model\.model_ema)\..+"
    r"|(alphas|betas|lvlb|log_one_minus|posterior|sqrt)(_\w+)?|logvar|v_pred|ztsnr"
)
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies, its shape, and its safetensors dtype name ("F16", "F32", …).

    `rows` are those of the stored tensor that make this one, all where None; `transposed` says that the stored
    matrix is this one's transpose. `shape` is what they leave; `position` orders the tensors of a file.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    rows: tuple[int, int] | None = None
    transposed: bool = False
    position: int = 0

    def part(self, index: int, parts: int) -> "TensorInfo":
        """Return the `index`-th of `parts` equal ranges of rows; a remainder is left out, for shapes to disagree."""
        if not self.shape:
            return self
        size = self.shape[0] // parts
        return replace(self, shape=(size, *self.shape[1:]), rows=(index * size, (index + 1) * size))

    def transpose(self) -> "TensorInfo":
        """Return the transpose of a stored matrix."""
        return replace(self, shape=self.shape[::-1], transposed=not self.transposed)


class Checkpoint:
    """A model's tensors over one or several safetensors files; nothing is read before it is asked for."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = dict(tensors)

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
                raise _broken(info.file, exc) from exc
            except OSError as exc:
                raise explain_os_error(exc, f"reading {info.file}") from exc
            budget -= tensor.nbytes
            yield name, tensor

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """Return `names` as their bytes follow each other on the disk, which is how to read them fast."""

        def place(name: str) -> tuple[str, int, int]:
            info = self.tensors[name]
            return str(info.file), info.position, info.rows[0] if info.rows else 0

        return sorted(names, key=place)


def _load(handle: Any, info: TensorInfo) -> torch.Tensor:
    stored = handle.get_tensor(info.key) if info.rows is None else handle.get_slice(info.key)[slice(*info.rows)]
    tensor: torch.Tensor = stored
    return tensor.T.contiguous() if info.transposed else tensor


def open_checkpoint(folder: Path, stem: str, variant: str = "") -> Checkpoint:
    """Open the safetensors of a component folder: one file ``<stem>.safetensors``, or shards with their index.

    A `variant` ("fp16") is preferred to the plain files where it is there. Raises SourceError where there are no
    weights, or only pickled ones; CorruptError for broken files.
    """
    try:
        names = [path.name for path in folder.iterdir() if path.is_file()]
    except OSError as exc:
        raise explain_os_error(exc, f"reading {folder}") from exc
    entry = folder / find_weights(names, stem, str(folder), variant)
    return Checkpoint(_read_headers(_shards(folder, entry) if entry.suffix == ".json" else [entry]))


def open_file(path: Path) -> Checkpoint:
    """Open one safetensors file. Raises CorruptError where it is broken, UsageError where it cannot be read."""
    return Checkpoint(_read_headers([path]))


def _shards(folder: Path, index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        return [_inside(folder, str(name)) for name in sorted(names)]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OSError) as exc:
        raise CorruptError(f"{index}: not a safetensors index ({exc}); download the model again") from exc


def _inside(folder: Path, name: str) -> Path:
    if "/" in name or not name.endswith(".safetensors"):
        raise CorruptError(f"{folder}: index names {name!r}, which is not a safetensors file beside it")
    # A hub cache links its files, so a link is followed here, by the name that was checked above.
    path = folder / name if (folder / name).is_symlink() else contained(folder, name)
    if not path.is_file():
        raise CorruptError(f"{path}: named by the index but missing; download the model again")
    return path


def _read_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for position, key in enumerate(handle.offset_keys()):
                    part = handle.get_slice(key)
                    shape, dtype = tuple(part.get_shape()), part.get_dtype()
                    tensors[key] = TensorInfo(file, key, shape, dtype, position=position)
        except SafetensorError as exc:
            raise _broken(file, exc) from exc
        except OSError as exc:
            raise explain_os_error(exc, f"reading {file}") from exc
    return tensors


def _broken(file: Path, exc: Exception) -> CorruptError:
    return CorruptError(f"{file}: broken safetensors ({exc}); download it again")


def _spellings(name: str) -> Iterator[str]:
    """Yield the names under which a published `name` has been stored, oldest last."""
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
    """Return `checkpoint` under the published names that `wanted` maps to shapes.

    Accepts CLIP keys with and without ``text_model.``, and the attention names of older autoencoders (whose
    weights may carry two trailing dimensions of 1). Extra tensors are warned of, except what published files are
    known to carry; missing, misshapen and quantized ones raise CorruptError.
    """
    found: dict[str, TensorInfo] = {}
    used: set[str] = set()
    for name, shape in wanted.items():
        stored = next((spelling for spelling in _spellings(name) if spelling in checkpoint.tensors), None)
        if stored is None:
            raise CorruptError(f"{where}: tensor {name} is missing; the checkpoint is incomplete or of another model")
        found[name] = _checked(checkpoint.tensors[stored], name, shape, where)
        used.add(stored)
    extra = sorted(name for name in checkpoint.tensors.keys() - used if not known_extra(name))
    if extra:
        warn(f"{where}: {len(extra)} tensors that the model does not use were left out, {extra[0]} for one")
    return Checkpoint(found)


def _checked(info: TensorInfo, name: str, shape: tuple[int, ...], where: str) -> TensorInfo:
    if info.shape not in (shape, (*shape, 1, 1)):
        raise CorruptError(f"{where}: tensor {name} has shape {list(info.shape)}, but the config asks for"
                           f" {list(shape)}; the config and the weights are of different models")  # fmt: skip
    if info.dtype not in _FLOATS:
        raise CorruptError(f"{where}: tensor {name} is stored as {info.dtype}, quantized; give the model in fp16 or"
                           " fp32")  # fmt: skip
    return replace(info, shape=shape)


def known_extra(name: str) -> bool:
    """Return whether published files are known to carry a tensor `name` that no model reads."""
    return _KNOWN_EXTRA.fullmatch(name) is not None


def digest_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """Return a sha256 over (name, dtype, shape, bytes) of the tensors called `names`, in constant memory."""
    digest = hashlib.sha256()
    for name, tensor in checkpoint.read(sorted(names)):
        info = checkpoint.tensors[name]
        digest.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
