"""LoRA files: what a .safetensors file does to which modules, before a weight is read."""

__all__ = ["Lora", "open_lora", "same_tensors"]

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sdxl_trt.engines import CorruptError, SourceError, UsageError, explain_os_error
from sdxl_trt.engines.host import known_as, sha256_file
from sdxl_trt.export.checkpoints import PICKLED, Checkpoint, TensorInfo, open_file
from sdxl_trt.export.lora.kinds import Branch, make_branches
from sdxl_trt.export.lora.names import (
    COMPONENTS,
    LoraComponent,
    Place,
    adapter_name,
    embedding_name,
    foreign_format,
    place_module,
    split_key,
)
from sdxl_trt.export.lora.settings import read_settings

_SHOWN = 5
# SDXL reads its first encoder before the projection that CLIP has there, and OneTrainer trains it all the same.
_FIRST_PROJECTION = ("text_encoder", "text_projection")


@dataclass(frozen=True)
class Lora:
    """An opened LoRA file: its branches by component, and sentences on what it holds that is left out.

    `sha256` is the file's digest; where a peft folder's adapter_config.json sets the scaling, that of both.
    """

    path: Path
    sha256: str
    branches: Mapping[LoraComponent, tuple[Branch, ...]]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file's name without its folder: what a manifest may say."""
        return known_as(self.path)


def open_lora(path: Path) -> Lora:
    """Open a LoRA in any naming of kohya's scripts, LyCORIS, OneTrainer, peft, diffusers or ComfyUI.

    LoRA and LoCon, DoRA, LoHa, LoKr and full differences, of weights, biases and normalizations; weights are read
    later. The scaling of a branch is its ``alpha`` tensor / rank; without one, what the adapter's settings say (in
    the header, or adapter_config.json beside a peft file); without both, 1, as in kohya's scripts and in diffusers.
    Raises SourceError for a file that is no LoRA of SDXL's parts, or of a kind that is not fused; CorruptError for a
    broken one; UsageError where there is none.
    """
    _check_path(path)
    checkpoint = open_file(path)
    keys = [key for key in checkpoint.tensors if embedding_name(key) is None]
    _refuse_foreign(path, keys)
    modules = _sort(path, checkpoint, keys)
    alphas = _alphas(path, checkpoint, keys)
    settings = read_settings(path, checkpoint.tensors, _header(path))
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
    notes = tuple(f"{path}: {note}" for note in _notes(checkpoint.tensors, branches, idle, projected=projected))
    if not branches:
        raise SourceError(f"{path}: changes no tensor of SDXL, whose first text encoder has no projection; use another"
                          " LoRA")  # fmt: skip
    return Lora(path, _digest(path, settings.side_file), {key: tuple(own) for key, own in branches.items()}, notes)


def same_tensors(one: Branch, other: Branch) -> bool:
    """Return whether two branches are equal: kind, scaling, and every tensor, which are read."""
    if (one.kind, one.scaling, one.bias, one.parts.keys()) != (other.kind, other.scaling, other.bias,
                                                              other.parts.keys()):  # fmt: skip
        return False
    return all(_same(info, other.parts[part]) for part, info in one.parts.items())


def _same(one: TensorInfo, other: TensorInfo) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    read = Checkpoint({"one": one, "other": other}).read(["one", "other"])
    return torch.equal(next(read)[1], next(read)[1])


def _check_path(path: Path) -> None:
    if path.suffix.lower() in PICKLED:
        raise SourceError(f"{path}: a pickled LoRA, which can run code when loaded; convert it to safetensors")
    if path.suffix.lower() != ".safetensors":
        raise SourceError(f"{path}: a LoRA is one .safetensors file; give its path")
    if not path.is_file():
        raise UsageError(f"{path}: no such file; check the path of the LoRA")


def _header(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as handle:
            return handle.metadata() or {}
    except (OSError, SafetensorError) as exc:  # it was sound a moment ago
        raise CorruptError(f"{path}: changed while it was read ({exc}); run again") from exc


def _alphas(path: Path, checkpoint: Checkpoint, keys: Iterable[str]) -> dict[str, float]:
    """Return the values of the alphas by key: a few thousand numbers at most."""
    values: dict[str, float] = {}
    for key, tensor in checkpoint.read([key for key in keys if key.endswith(".alpha")]):
        if tensor.numel() != 1 or not math.isfinite(value := float(tensor.item())):
            raise CorruptError(
                f"{path}: {key!r} of shape {list(tensor.shape)} is not one finite number; the LoRA is damaged"
            )
        values[key] = value
    return values


def _refuse_foreign(path: Path, keys: Iterable[str]) -> None:
    for key in keys:
        name = foreign_format(key)
        if name is not None:
            raise SourceError(
                f"{path}: holds {name} ({key!r}), which is not fused here; merge it into the checkpoint with the tool"
                " that made it, or take a LoRA, LoHa, LoKr or DoRA"
            )


def _sort(path: Path, checkpoint: Checkpoint, keys: Sequence[str]) -> dict[Place, dict[str, TensorInfo]]:
    """Return the parts by place; every key has one, or an error says which has not."""
    known = {key: split for key in keys if (split := split_key(key)) is not None}
    if not known:
        what = "holds embeddings alone" if checkpoint.tensors and not keys else "is not a LoRA"
        raise SourceError(f"{path}: {what}: no key ends in .lora_down.weight, .lora_A.weight or the like")
    adapters = sorted({name for key in keys if (name := adapter_name(key)) is not None})
    if len(adapters) > 1:
        raise SourceError(f"{path}: holds the adapters {' and '.join(map(repr, adapters))}; save one a file")
    places: dict[Place, dict[str, TensorInfo]] = {}
    for key in keys:
        if key not in known:
            raise SourceError(f"{path}: {key!r} is no tensor of a LoRA, and nothing is left out; remove or convert it")
        spelled, part = known[key]
        place = place_module(spelled)
        if place is None:
            raise SourceError(
                f"{path}: {key!r} names none of SDXL's parts ({', '.join(COMPONENTS)}); use a LoRA that was trained on"
                " SDXL base, or rename its keys"
            )
        parts, info = places.setdefault(place, {}), checkpoint.tensors[key]
        if part in parts and not _same(info, parts[part]):
            raise SourceError(f"{path}: {key!r} and {parts[part].key!r} are of the same module and differ; remove one"
                              " of them")  # fmt: skip
        parts[part] = info
    return places


def _notes(
    keys: Iterable[str], branches: Mapping[LoraComponent, Sequence[Branch]], idle: Sequence[str], *, projected: bool
) -> list[str]:
    """Return a sentence on each kind of tensors that change nothing, and on DoRA that ComfyUI takes otherwise."""
    notes = []
    words = dict.fromkeys(word for key in keys if (word := embedding_name(key)) is not None)
    if words:
        notes.append(f"the embeddings {_some(words)} that come with the LoRA are left out, and prompts with these"
                     " words will not be what it was trained on")  # fmt: skip
    if projected:
        notes.append("SDXL's first text encoder has no projection, so that the LoRA's changes nothing and is left out")
    if idle:
        notes.append(f"{_some(idle)} is beside no low-rank weight and changes nothing")
    lycoris = [each for own in branches.values() for each in own if "dora_scale" in each.parts]
    if any(each.parts["dora_scale"].shape[0] > 1 for each in lycoris):
        notes.append("its DoRA holds norms of outputs and is fused as it was trained; ComfyUI divides by other norms,"
                     " and its pictures differ a little")  # fmt: skip
    return notes


def _some(names: Iterable[str]) -> str:
    """Return the names, or the first few of many."""
    known = list(names)
    shown = ", ".join(repr(name) for name in known[:_SHOWN])
    return shown if len(known) <= _SHOWN else f"{shown} and {len(known) - _SHOWN} more"


def _digest(path: Path, extra: bytes) -> str:
    try:
        digest = sha256_file(path)
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
    return hashlib.sha256(digest.encode() + extra).hexdigest() if extra else digest
