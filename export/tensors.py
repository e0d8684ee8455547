"""Checkpoints as names, shapes and dtypes first, and tensors one at a time later."""

__all__ = ["Checkpoint", "TensorInfo", "digest_tensors", "open_checkpoint", "resolve_names"]

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sdxl_trt.engines.errors import CorruptError, SourceError, explain_os_error
from sdxl_trt.engines.files import contained

# A mapped file counts as resident once its pages are touched: the mapping is renewed after this many bytes.
REMAP_BYTES = 256 << 20
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
# Buffers that older versions saved and that the models compute for themselves.
COMPUTED = ("position_ids",)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies, and its shape and safetensors dtype name ("F16", "F32", …)."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


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
                tensor = handle.get_tensor(info.key)
            except SafetensorError as exc:
                raise _broken(info.file, exc) from exc
            budget -= tensor.nbytes
            yield name, tensor


def open_checkpoint(folder: Path, stem: str) -> Checkpoint:
    """Open the safetensors of a component folder: one file ``<stem>.safetensors``, or shards with their index.

    Raises SourceError where there are none, or only pickled weights; CorruptError for broken files.
    """
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        return Checkpoint(_read_headers([single]))
    if index.is_file():
        return Checkpoint(_read_headers(_shards(folder, index)))
    raise _no_weights(folder, stem)


def _no_weights(folder: Path, stem: str) -> SourceError:
    present = sorted(path.name for path in folder.iterdir() if path.is_file())
    variants = [name for name in present if name.endswith(".safetensors")]
    if variants:
        return SourceError(f"{folder}: expected {stem}.safetensors, found {', '.join(variants)}; rename it")
    pickled = [name for name in present if name.endswith(PICKLED)]
    if pickled:
        return SourceError(
            f"{folder}: only pickled weights ({pickled[0]}), which can run code when loaded; convert them to"
            " safetensors (save_pretrained(..., safe_serialization=True))"
        )
    return SourceError(f"{folder}: has no {stem}.safetensors; download the whole model folder")


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
                for key in handle.keys():  # noqa: SIM118 - not a mapping
                    part = handle.get_slice(key)
                    tensors[key] = TensorInfo(file, key, tuple(part.get_shape()), part.get_dtype())
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
    weights may carry two trailing dimensions of 1). Extra tensors are warned of; missing or misshapen ones
    raise CorruptError.
    """
    found: dict[str, TensorInfo] = {}
    used: set[str] = set()
    for name, shape in wanted.items():
        stored = next((spelling for spelling in _spellings(name) if spelling in checkpoint.tensors), None)
        if stored is None:
            raise CorruptError(f"{where}: tensor {name} is missing; the checkpoint is incomplete or of another model")
        info = checkpoint.tensors[stored]
        if info.shape not in (shape, (*shape, 1, 1)):
            raise CorruptError(f"{where}: tensor {name} has shape {list(info.shape)}, but the config asks for"
                               f" {list(shape)}; the config and the weights are of different models")  # fmt: skip
        found[name] = TensorInfo(info.file, stored, shape, info.dtype)
        used.add(stored)
    extra = sorted(name for name in checkpoint.tensors.keys() - used if not name.endswith(COMPUTED))
    if extra:
        warn(f"{where}: {len(extra)} tensors that the model does not use were left out, {extra[0]} for one")
    return Checkpoint(found)


def digest_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """Return a sha256 over (name, dtype, shape, bytes) of the tensors called `names`, in constant memory."""
    digest = hashlib.sha256()
    for name, tensor in checkpoint.read(sorted(names)):
        info = checkpoint.tensors[name]
        digest.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
