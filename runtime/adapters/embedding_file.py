"""Read a textual inversion embedding: the vectors that stand for a few tokens, one set for each text encoder.

Three layouts of safetensors files are read: `clip_l` and `clip_g` (SDXL, as trainers, ComfyUI and A1111 write them), a
single tensor `emb_params` (A1111), and a single tensor named after its token (diffusers). Pickled files are refused.
"""

__all__ = ["ENCODERS", "Embedding", "EncoderName", "read_embedding"]

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import SourceError, UsageError, explain_os_error
from sdxl_trt.engines.adapters import StoredTensor, open_tensors, read_tensor
from sdxl_trt.engines.host import known_as
from sdxl_trt.engines.plans import MAX_VECTORS

EncoderName = Literal["clip_l", "clip_g"]
ENCODERS: tuple[EncoderName, ...] = ("clip_l", "clip_g")
"""The encoders of SDXL's base in its order; a refiner has the last one only."""
MAX_BYTES = 16 << 20
"""More than MAX_VECTORS take for both encoders in fp64."""
_KEPT = 64
_FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 80
_SINGLE = ""


@dataclass(frozen=True)
class Embedding:
    """An embedding: the file's name without its folder, the digest of its content, and its vectors by encoder.

    `tensors` holds float32 arrays (vectors, width) that are not written to, under the encoders' names, or under "" if
    the file does not say which encoder they are for. Embeddings of equal content are equal.
    """

    name: str = field(compare=False)
    sha256: str
    tensors: Mapping[str, NDArray[np.float32]] = field(compare=False, repr=False)

    def found_by(self, encoder: EncoderName) -> NDArray[np.float32]:
        """Return the vectors that ComfyUI takes for an encoder: its own, or else the file's first."""
        return self.tensors[encoder] if encoder in self.tensors else next(iter(self.tensors.values()))

    def vectors(self, encoder: EncoderName, width: int) -> NDArray[np.float32] | None:
        """Return the vectors (vectors, width) for an encoder of this width; None if the file has none for it."""
        found = self.found_by(encoder)
        return found if found.shape[1] == width else None


def read_embedding(path: Path) -> Embedding:
    """Return the embedding in a safetensors file; a file that has not changed is read once.

    Raises SourceError for a file of another kind, CorruptError for a broken one, UsageError if it cannot be read, or is
    a pipe, a device or a folder.
    """
    try:
        status = path.stat()
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
    # A pipe might never end.
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path}: is not a file; give an embedding as a .safetensors file")
    if status.st_size > MAX_BYTES:
        raise SourceError(f"{path}: is larger than {MAX_BYTES >> 20} MiB, so not an embedding of SDXL")
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return _read(os.fspath(path), state)


@lru_cache(maxsize=_KEPT)
def _read(name: str, _state: tuple[int, ...]) -> Embedding:
    path = Path(name)
    file = open_tensors(path)
    keys = _keys(path, list(file.tensors))
    stored = {encoder: file.tensors[key] for encoder, key in keys.items()}
    for each in stored.values():
        _check_shape(each)
    tensors = {encoder: _values(each) for encoder, each in stored.items()}
    if len({len(values) for values in tensors.values()}) > 1:
        counts = " and ".join(f"{len(values)} for {encoder}" for encoder, values in tensors.items())
        raise SourceError(f"{path}: holds {counts}, but an embedding has equally many vectors for both encoders")
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
    return Embedding(known_as(path), digest, tensors)


def _keys(path: Path, keys: list[str]) -> dict[str, str]:
    """Return the key of the tensor for each encoder, or of the only one under ""."""
    if named := [encoder for encoder in ENCODERS if encoder in keys]:
        others = [key for key in keys if key not in ENCODERS]
        if others:
            raise SourceError(f"{path}: also holds {others[0][:_SHOWN]!r}, so it was made for another model; use an"
                              " embedding of SDXL, which holds clip_l and clip_g")  # fmt: skip
        return {encoder: encoder for encoder in named}
    if len(keys) != 1:
        shown = ", ".join(key[:_SHOWN] for key in keys[:3]) or "nothing"
        raise SourceError(f"{path}: holds {len(keys)} tensors ({shown}), so it is not an embedding; one of SDXL holds"
                          " clip_l and clip_g")  # fmt: skip
    return {_SINGLE: keys[0]}


def _check_shape(stored: StoredTensor) -> None:
    where = f"{stored.file}: {stored.key[:_SHOWN]!r}"
    if len(stored.shape) not in (1, 2) or stored.dtype not in _FLOATS:
        raise SourceError(f"{where} is {stored.dtype} {list(stored.shape)}, but an embedding is floats (vectors,"
                          " width); this is another kind of file")  # fmt: skip
    count = stored.shape[0] if len(stored.shape) == 2 else 1
    if not 1 <= count <= MAX_VECTORS or stored.shape[-1] < 1:
        raise SourceError(f"{where} has shape {list(stored.shape)}; an embedding has 1 to {MAX_VECTORS} vectors")


def _values(stored: StoredTensor) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # refused below
        values = read_tensor(stored).astype(np.float32).reshape(-1, stored.shape[-1])
    if not np.isfinite(values).all():
        raise SourceError(f"{stored.file}: {stored.key[:_SHOWN]!r} holds NaN or infinity; its training failed: use"
                          " another embedding")  # fmt: skip
    values.flags.writeable = False
    return values
