"""Which safetensors files of a component folder hold its weights: plain or a variant, one file or shards."""

__all__ = ["find_weights", "shard_names"]

import logging
import re
from collections.abc import Iterable, Iterator, Sequence

from sdxl_trt.engines import SourceError
from sdxl_trt.engines.adapters import PICKLED

log = logging.getLogger("sdxl_trt.export")
# One file; the index of shards as diffusers and transformers name it now; the index as they used to name it.
_FORMS = (
    r"{stem}(?:\.(\w+))?\.safetensors",
    r"{stem}(?:\.(\w+))?\.safetensors\.index\.json",
    r"{stem}\.safetensors\.index\.(\w+)\.json",
)


def find_weights(names: Iterable[str], stem: str, where: str, variant: str = "") -> str:
    """Return the file among `names` that holds the weights called `stem`: a safetensors file, or an index of shards.

    Prefers the requested `variant` ("fp16"), then the plain file, then the only variant.
    Raises SourceError, naming what was found, if none of these exists.
    """
    present = sorted(names)
    found = _variants(present, stem)
    for choice in (variant, ""):
        if choice in found:
            others = [name for name in _named(present, stem, choice) if name != found[choice]]
            if others:  # diffusers prefers the shards, transformers the single file
                log.warning("%s: has both %s and %s; using the first", where, found[choice], others[0])
            return found[choice]
    if len(found) == 1:
        name = next(iter(found.values()))
        log.info("%s: no plain %s.safetensors; using %s", where, stem, name)
        return name
    if found:
        raise SourceError(f"{where}: no plain {stem}.safetensors, but {', '.join(found.values())}; keep one of them")
    raise _no_weights(present, stem, where)


def shard_names(names: Iterable[str], stem: str, entry: str) -> list[str]:
    """Return the shards among `names` that belong to the index `entry`; empty if `entry` is a single file."""
    if not entry.endswith(".json"):
        return []
    variant = next(variant for variant, name in _variants([entry], stem).items() if name == entry)
    mark = re.escape(f".{variant}") if variant else ""
    number = r"-\d+-of-\d+"
    pattern = re.compile(rf"{re.escape(stem)}(?:{mark}{number}|{number}{mark})\.safetensors")
    return [name for name in names if pattern.fullmatch(name)]


def _variants(names: Sequence[str], stem: str) -> dict[str, str]:
    """Return {variant: file}; "" is the plain one, and a single file is preferred to shards."""
    found: dict[str, str] = {}
    for variant, name in _matches(names, stem):
        found.setdefault(variant, name)
    return found


def _named(names: Sequence[str], stem: str, variant: str) -> list[str]:
    return [name for found, name in _matches(names, stem) if found == variant]


def _matches(names: Sequence[str], stem: str) -> Iterator[tuple[str, str]]:
    for form in _FORMS:
        pattern = re.compile(form.format(stem=re.escape(stem)))
        for name in names:
            match = pattern.fullmatch(name)
            if match:
                yield match[1] or "", name


def _no_weights(present: Sequence[str], stem: str, where: str) -> SourceError:
    others = [name for name in present if name.endswith(".safetensors")]
    if others:
        return SourceError(f"{where}: expected {stem}.safetensors, found {', '.join(others)}; rename it")
    pickled = [name for name in present if name.endswith(PICKLED)]
    if pickled:
        return SourceError(
            f"{where}: only pickled weights ({pickled[0]}), which can run code when loaded; convert them to"
            " safetensors (save_pretrained(..., safe_serialization=True))"
        )
    return SourceError(f"{where}: no {stem}.safetensors; download the whole model folder")
