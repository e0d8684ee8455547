"""Settle a request's LoRAs before anything is loaded: find their files, open their headers, compare them with a bundle.

A LoRA is applied in the order of the request; one that is named twice is applied twice, so its scales add up, as with
two of ComfyUI's loaders.
"""

__all__ = [
    "MOST_LORAS",
    "LoraFact",
    "SettledLoras",
    "find_lora",
    "find_recorded",
    "lora_digest",
    "lora_file",
    "settle_loras",
]

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Annotated

import msgspec

from sdxl_trt.engines import SdxlTrtError, SourceError, UsageError
from sdxl_trt.engines.adapters import (
    COMPONENTS,
    Lora,
    LoraComponent,
    ScaledLora,
    component_role,
    open_lora,
    open_tensors,
    targets,
)
from sdxl_trt.engines.bundle import Bundle, LoraRecord, Stage, read_table
from sdxl_trt.runtime.adapters.folder import ENDING, find_named
from sdxl_trt.runtime.adapters.use import LoraUse

MOST_LORAS = 32
"""Neither A1111 nor ComfyUI has a limit; each one more is read, and merged or multiplied in every step."""
MOST_SCALE = 1e6
Scale = Annotated[float, msgspec.Meta(ge=-MOST_SCALE, le=MOST_SCALE)]
_SHOWN = 80
_SIDE_FILE = "adapter_config.json"
_HASHED_BY_TRAINER = "sshs_model_hash"
_SHORT_HASH = re.compile("[0-9a-f]{12}")


class LoraFact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a record says of a LoRA: its file's name and digest, and its scales; `text_scale` None is the UNet's.

    `short_hash` is A1111's and Civitai's: the first digits of the digest of the tensors, without the header.
    """

    name: Annotated[str, msgspec.Meta(max_length=255)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    scale: Scale
    text_scale: Scale | None = None
    short_hash: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{12}$")] = "0" * 12


@dataclass(frozen=True)
class SettledLoras:
    """The LoRAs of a stage, what a record says of each, and sentences for the user on what has no effect."""

    loras: tuple[ScaledLora, ...] = ()
    facts: tuple[LoraFact, ...] = ()
    notes: tuple[str, ...] = ()


def lora_file(path: str, folder: Path | None, option: str) -> Path:
    """Return the file that a request means by `path`: that file, or else the one of this name in `folder`.

    `option` is named in messages. Raises UsageError if there is none, or if the folder has several of this name.
    """
    given = Path(path)
    if _is_file(given):
        return given
    if folder is not None and not given.is_absolute():
        return find_lora(path, folder, f"{option} {path[:_SHOWN]}")
    if given.suffix:
        return given  # opening it raises the error for a pickled, a missing or another file
    raise UsageError(f"{option} {path[:_SHOWN]}: no such file; give a {ENDING} file, or the folder of such files with"
                     " --lora-dir DIR")  # fmt: skip


def find_lora(name: str, folder: Path | None, where: str, *, exact: bool = False) -> Path:
    """Return the only file called `name` in `folder` or below; `where` begins an error's message.

    With `exact` the name is a path from the folder, as in ComfyUI. Raises UsageError for none and for several.
    """
    if folder is None:
        raise UsageError(f"{where}: there is no folder to find {name[:_SHOWN]!r} in; give it with --lora-dir DIR")
    found = find_named(folder, name, where, exact=exact)
    if not found:
        raise UsageError(f"{where}: {folder} has no {name[:_SHOWN].removesuffix(ENDING)}{ENDING}; check the name")
    if len(found) > 1:
        raise UsageError(f"{where}: is the name of {found[0]} and of {found[1]}; put the folder's name and / before"
                         " it, or give one with its path: --lora FILE")  # fmt: skip
    return found[0]


def lora_digest(path: Path) -> str:
    """Return the SHA-256 of a LoRA's file, in hexadecimal, which is read once. Raises what `open_lora` raises."""
    return _opened(os.fspath(path), _state(path))[0].sha256


def find_recorded(fact: LoraFact, folder: Path | None, source: Path, hint: str = "") -> Path:
    """Return the LoRA's file of a record, unchanged: in `folder`, beside the picture `source` or in the current folder.

    Raises UsageError if there is none; `hint` ends its message.
    """
    named: list[Path] = []
    if folder is not None:
        with contextlib.suppress(UsageError):  # a name that the folder cannot have: another place may
            named = find_named(folder, fact.name, fact.name[:_SHOWN])
    beside = [source.parent / fact.name, Path(fact.name)] if PurePath(fact.name).name == fact.name else []
    for path in (*named, *beside):
        with contextlib.suppress(SdxlTrtError):  # another file of this name
            if _is_file(path) and lora_digest(path) == fact.sha256:
                return path
    places = "beside it" if folder is None else f"beside it or in {folder}"
    raise UsageError(
        f"--from {source}: was made with the LoRA {fact.name[:_SHOWN]!r}, which is not {places} as it was;"
        f" give the folder that holds it with --lora-dir DIR{hint}"
    )


def settle_loras(
    uses: Sequence[LoraUse], stage: Stage, bundle: Bundle, folder: Path | None, *, refiner: bool
) -> SettledLoras:
    """Return the LoRAs `uses` of `stage`, the bundle's base or refiner, opened and compared with its models.

    Names are looked up in `folder`. Raises UsageError for a file that is missing, or that the bundle has fused;
    SourceError for one that is not a LoRA, or that was trained on another model; CorruptError for a broken one;
    IncompatibleError if the bundle is too old for LoRAs.
    """
    option = "--refiner-lora" if refiner else "--lora"
    if len(uses) > MOST_LORAS:
        raise UsageError(f"{option}: {len(uses)} LoRAs in one request; give at most {MOST_LORAS}")
    loras: list[ScaledLora] = []
    facts: list[LoraFact] = []
    for use in uses:
        _check_scales(use, option)
        path = lora_file(use.path, folder, option)
        lora, short_hash = _opened(os.fspath(path), _state(path))
        if not refiner:
            _check_not_fused(lora, bundle.manifest.loras, option)
        loras.append(ScaledLora(lora, use.scale, use.text_scale))
        facts.append(LoraFact(name=lora.name, sha256=lora.sha256, scale=use.scale, text_scale=use.text_scale,
                              short_hash=short_hash))  # fmt: skip
    parts = _parts(stage)
    for lora in dict.fromkeys(each.lora for each in loras):
        _check_fits(lora, parts, bundle, "refiner" if refiner else "base")
    fused = () if refiner else bundle.manifest.loras
    notes = dict.fromkeys([*_notes(loras, parts), *_perhaps_fused(loras, fused)])
    return SettledLoras(tuple(loras), tuple(facts), tuple(notes))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False  # no file can have this name


def _check_scales(use: LoraUse, option: str) -> None:
    for scale in (use.scale, use.text_scale):
        if scale is not None and not abs(scale) <= MOST_SCALE:  # also refuses nan
            raise UsageError(f"{option} {use.path[:_SHOWN]}: scale {scale:g}; give a number from {-MOST_SCALE:g} to"
                             f" {MOST_SCALE:g}")  # fmt: skip


def _check_not_fused(lora: Lora, fused: Sequence[LoraRecord], option: str) -> None:
    for record in fused:
        if record.sha256 == lora.sha256 or record.tensors_sha256 == lora.tensors_sha256:
            raise UsageError(f"{option} {lora.path}: is fused into this bundle at {record.told} already; leave it out")


def _perhaps_fused(loras: Sequence[ScaledLora], fused: Sequence[LoraRecord]) -> Iterator[str]:
    """Yield a sentence for each LoRA with the name of a fused one of which an older version recorded too little."""
    unsure = {record.name: record for record in fused if record.tensors_sha256 is None}
    for each in loras:
        if record := unsure.get(each.lora.name):
            yield (f"{each.lora.path}: the bundle has a LoRA of this name fused at {record.told} already, from a file"
                   " with another digest; if it is the same LoRA, leave it out")  # fmt: skip


def _parts(stage: Stage) -> Mapping[LoraComponent, str]:
    """Return the stage's component that each part of a LoRA changes."""
    names = (stage.unet, *(encoder.component for encoder in stage.text_encoders))
    return {role: name for name in names if (role := component_role(name)) is not None}


def _check_fits(lora: Lora, parts: Mapping[LoraComponent, str], bundle: Bundle, model: str) -> None:
    """Raise SourceError unless every module of `lora` is one of the model's, with fitting shapes."""
    for part in sorted(lora.branches, key=COMPONENTS.index):
        if part in parts:
            component = bundle.manifest.components[parts[part]]
            targets(lora, part, read_table(bundle, parts[part]).shapes, component.config, model)
        elif model == "base":
            raise SourceError(f"{lora.path}: changes a {part}, which this base lacks; use a LoRA that was trained on"
                              " this base")  # fmt: skip


def _notes(loras: Sequence[ScaledLora], parts: Mapping[LoraComponent, str]) -> Iterator[str]:
    for number, each in enumerate(loras):
        yield from each.notes()
        path = each.lora.path
        if not any(part in parts and each.on(part) for part in each.lora.branches):
            yield f"{path}: has no effect: it changes nothing that runs, at the scales that are given"
        if missing := sorted(part for part in each.lora.branches if part not in parts):
            yield f"{path}: also changes a {' and a '.join(missing)}, which this stage does not have"
        same = [other for other in loras if other.lora == each.lora]
        times = max(sum(other.on(part) != 0 for other in same) for part in COMPONENTS)
        if times > 1 and loras.index(same[0]) == number:
            total = sum(other.scale for other in same)
            yield f"{path}: is given {times} times, and its scales add up: {total:g} on the UNet"


State = tuple[int | None, ...]


def _state(path: Path) -> State:
    """Return what changes with the content of a LoRA's files; open_lora raises the error for a missing one."""
    found: list[int | None] = []
    for file in (path, path.with_name(_SIDE_FILE)):
        try:
            stat = file.stat()
        except (OSError, ValueError):
            found.append(None)
        else:
            found += [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    return tuple(found)


@lru_cache(maxsize=2 * MOST_LORAS)
def _opened(path: str, _: State) -> tuple[Lora, str]:
    """Return the LoRA in a file and its short hash; a file in the same state is read once."""
    lora = open_lora(Path(path))
    stated = _SHORT_HASH.match(open_tensors(lora.path).metadata.get(_HASHED_BY_TRAINER, ""))
    return lora, stated[0] if stated else lora.tensors_sha256[:12]
