"""LoRA files: which modules a .safetensors file changes, and how."""

__all__ = ["Lora", "open_lora", "same_tensors"]

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sdxl_trt.engines.adapters.first_bytes import PICKLED
from sdxl_trt.engines.adapters.kinds import Branch, make_branches
from sdxl_trt.engines.adapters.names import (
    COMPONENTS,
    LoraComponent,
    Place,
    adapter_name,
    embedding_name,
    foreign_format,
    place_module,
    split_key,
)
from sdxl_trt.engines.adapters.settings import read_settings
from sdxl_trt.engines.adapters.tensors import StoredTensor, TensorFile, open_tensors, read_finite, read_raw, read_tensor
from sdxl_trt.engines.errors import CorruptError, SourceError, UsageError, explain_os_error
from sdxl_trt.engines.host import known_as, sha256_file

_SHOWN = 5
# SDXL does not use the projection of its first encoder, but OneTrainer trains it.
_FIRST_PROJECTION = ("text_encoder", "text_projection")


@dataclass(frozen=True, eq=False)
class Lora:
    """An opened LoRA file: its branches by component, and `notes`, sentences on tensors without effect.

    `sha256` is the digest of the file; if a peft folder's adapter_config.json sets the scaling, of both files. Two
    LoRAs are equal if their digests are. `tensors_sha256` is the digest of the file without its header: it stays the
    same if only the metadata is edited, and is the one that A1111 and Civitai shorten.
    """

    path: Path
    sha256: str
    branches: Mapping[LoraComponent, tuple[Branch, ...]]
    notes: tuple[str, ...] = ()
    tensors_sha256: str = ""

    @property
    def name(self) -> str:
        """The file's name without its folder, for a manifest."""
        return known_as(self.path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lora) and other.sha256 == self.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)


def open_lora(path: Path) -> Lora:
    """Open a LoRA with the key names of kohya's scripts, LyCORIS, OneTrainer, peft, diffusers or ComfyUI.

    Supports LoRA, LoCon, DoRA, LoHa, LoKr and full differences, of weights, biases and normalizations. Weights are read
    once, so that a damaged one is found before a run, and not kept. The scaling of a branch is its ``alpha`` tensor /
    rank; without one, the scaling in the adapter's settings (in the header, or adapter_config.json beside a peft file);
    without both, 1, as in kohya's scripts and in diffusers.
    Raises SourceError for a file that is not a LoRA for SDXL, or of an unsupported kind; CorruptError for a broken
    file, and for NaN or infinite weights; UsageError for a missing one.
    """
    _check_path(path)
    file = open_tensors(path)
    keys = [key for key in file.tensors if embedding_name(key) is None]
    _refuse_foreign(path, keys)
    modules = _sort(file, keys)
    alphas = _alphas(file, keys)
    settings = read_settings(path, file.tensors, file.metadata)
    branches: dict[LoraComponent, list[Branch]] = {}
    idle: list[str] = []
    projected = False
    for place, parts in modules.items():
        stated = parts.pop("alpha", None)
        alpha = None if stated is None else alphas[stated.key]
        made = list(make_branches(path, place, parts, alpha))
        if (place.component, place.module) == _FIRST_PROJECTION:
            projected = True
            continue
        for branch in made:
            settings.check(branch)
            scaled = branch if alpha is not None else replace(branch, scaling=settings.scaling(branch))
            branches.setdefault(place.component, []).append(scaled)
        if stated is not None and all(part in {"diff", "diff_b"} for part in parts):
            idle.append(stated.key)
    notes = tuple(f"{path}: {note}" for note in _notes(file.tensors, branches, idle, projected=projected))
    if not branches:
        raise SourceError(f"{path}: changes only a projection that SDXL's first text encoder does not have; use another"
                          " LoRA")  # fmt: skip
    digests = _digest(path, settings.side_file), _digest_of_tensors(path)
    _check_values(branch for own in branches.values() for branch in own)
    return Lora(path, digests[0], {key: tuple(own) for key, own in branches.items()}, notes, digests[1])


def same_tensors(one: Branch, other: Branch) -> bool:
    """Return whether two branches are equal: kind, scaling, and every tensor; reads the tensors."""
    if (one.kind, one.scaling, one.bias, one.parts.keys()) != (other.kind, other.scaling, other.bias,
                                                              other.parts.keys()):  # fmt: skip
        return False
    return all(_same(info, other.parts[part]) for part, info in one.parts.items())


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return np.array_equal(read_raw(one), read_raw(other))


def _check_path(path: Path) -> None:
    if path.suffix.lower() in PICKLED:
        raise SourceError(f"{path}: is a pickled LoRA, which can run code when loaded; convert it to safetensors")
    if path.suffix.lower() != ".safetensors":
        raise SourceError(f"{path}: expected a LoRA as one .safetensors file; give its path")
    if not path.is_file():
        raise UsageError(f"{path}: no such file; check the path of the LoRA")


def _alphas(file: TensorFile, keys: Iterable[str]) -> dict[str, float]:
    """Return {key: value} of the alphas, a few thousand numbers at most."""
    values: dict[str, float] = {}
    for info in (file.tensors[key] for key in keys if key.endswith(".alpha")):
        if math.prod(info.shape) != 1 or not math.isfinite(value := float(read_tensor(info).item())):
            raise CorruptError(f"{info.file}: {info.key!r} of shape {list(info.shape)} is not one finite number; the"
                               " LoRA is damaged")  # fmt: skip
        values[info.key] = value
    return values


def _check_values(branches: Iterable[Branch]) -> None:
    """Raise CorruptError for NaN and infinite values, one tensor in memory at a time."""
    for info in (info for branch in branches for info in branch.infos):
        read_finite(info)


def _refuse_foreign(path: Path, keys: Iterable[str]) -> None:
    for key in keys:
        name = foreign_format(key)
        if name is not None:
            raise SourceError(
                f"{path}: holds {name} ({key!r}), which is not supported; merge it into the checkpoint with the tool"
                " that made it, or use a LoRA, LoHa, LoKr or DoRA"
            )


def _sort(file: TensorFile, keys: Sequence[str]) -> dict[Place, dict[str, StoredTensor]]:
    """Return {place: {part: tensor}}; raise SourceError for a key without a place."""
    path = file.path
    known = {key: split for key in keys if (split := split_key(key)) is not None}
    if not known:
        what = "holds only embeddings" if file.tensors and not keys else "is not a LoRA"
        raise SourceError(f"{path}: {what}: no key ends in .lora_down.weight, .lora_A.weight or similar")
    adapters = sorted({name for key in keys if (name := adapter_name(key)) is not None})
    if len(adapters) > 1:
        raise SourceError(f"{path}: holds the adapters {' and '.join(map(repr, adapters))}; save one per file")
    places: dict[Place, dict[str, StoredTensor]] = {}
    for key in keys:
        if key not in known:
            raise SourceError(f"{path}: {key!r} is not a LoRA tensor; remove or convert it")
        spelled, part = known[key]
        place = place_module(spelled)
        if place is None:
            raise SourceError(
                f"{path}: {key!r} belongs to no component of SDXL ({', '.join(COMPONENTS)}); use a LoRA that was"
                " trained on SDXL base, or rename its keys"
            )
        parts, info = places.setdefault(place, {}), file.tensors[key]
        if part in parts and not _same(info, parts[part]):
            raise SourceError(f"{path}: {key!r} and {parts[part].key!r} name the same module but differ; remove one"
                              " of them")  # fmt: skip
        parts[part] = info
    return places


def _notes(
    keys: Iterable[str], branches: Mapping[LoraComponent, Sequence[Branch]], idle: Sequence[str], *, projected: bool
) -> list[str]:
    """Return one sentence per kind of tensors without effect, and one on DoRA that ComfyUI fuses differently."""
    notes = []
    words = dict.fromkeys(word for key in keys if (word := embedding_name(key)) is not None)
    if words:
        notes.append(f"ignored the LoRA's embeddings {_some(words)}; prompts with these words will not match its"
                     " training")  # fmt: skip
    if projected:
        notes.append("ignored the LoRA's projection of the first text encoder, which SDXL does not use")
    if idle:
        notes.append(f"ignored {_some(idle)}, which has no low-rank weight to scale")
    lycoris = [each for own in branches.values() for each in own if "dora_scale" in each.parts]
    if any(each.parts["dora_scale"].shape[0] > 1 for each in lycoris):
        notes.append("its DoRA has norms per output and is fused as in training; ComfyUI divides by other norms, so"
                     " its pictures differ a little")  # fmt: skip
    return notes


def _some(names: Iterable[str]) -> str:
    """Return the names, or the first few and the number of the others."""
    known = list(names)
    shown = ", ".join(repr(name) for name in known[:_SHOWN])
    return shown if len(known) <= _SHOWN else f"{shown} and {len(known) - _SHOWN} more"


def _digest(path: Path, extra: bytes) -> str:
    try:
        digest = sha256_file(path)
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
    return hashlib.sha256(digest.encode() + extra).hexdigest() if extra else digest


def _digest_of_tensors(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
