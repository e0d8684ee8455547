"""LoRA files: which low-rank branches a .safetensors file adds to which modules, before a weight is read."""

__all__ = ["Branch", "Lora", "open_lora"]

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sdxl_trt.engines.errors import CorruptError, SourceError, UsageError, explain_os_error
from sdxl_trt.engines.files import sha256_file
from sdxl_trt.export.lora_names import COMPONENTS, Component, Part, foreign_format, place_module, split_key
from sdxl_trt.export.lora_settings import AdapterSettings, read_settings
from sdxl_trt.export.tensors import Checkpoint, TensorInfo, open_file
from sdxl_trt.export.weight_files import PICKLED

_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


@dataclass(frozen=True)
class Branch:
    """A branch beside one module: down (r, in…), up (out, r…), mid (r, r, kh, kw) or None; `scaling` is alpha / r."""

    down: TensorInfo
    up: TensorInfo
    mid: TensorInfo | None
    scaling: float

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """The branch's tensors: up, down, and mid where there is one."""
        return (self.up, self.down) if self.mid is None else (self.up, self.down, self.mid)


@dataclass(frozen=True)
class Lora:
    """An opened LoRA file: its branches by component and by module, as `place_module` spells it.

    `sha256` is the file's digest; where a peft folder's adapter_config.json sets the scaling, that of both.
    """

    path: Path
    sha256: str
    branches: Mapping[Component, Mapping[str, Branch]]

    @property
    def name(self) -> str:
        """The file's name without its folder: what a manifest may say."""
        return self.path.name


def open_lora(path: Path) -> Lora:
    """Open a LoRA in any naming of kohya's scripts, LyCORIS' LoCon, peft or diffusers; weights are read later.

    The scaling of a branch is its ``alpha`` tensor / rank; without one, what the adapter's settings say (in the
    header, or adapter_config.json beside a peft file); without both, 1, as in kohya's scripts and in diffusers.
    Raises SourceError for a file that is no LoRA of SDXL's parts, or a kind of adapter that is not LoRA;
    CorruptError for a broken one; UsageError where there is none.
    """
    _check_path(path)
    checkpoint = open_file(path)
    _refuse_foreign(path, checkpoint.tensors)
    places = _sort(path, checkpoint.tensors)
    alphas = _alphas(path, checkpoint)
    settings = read_settings(path, checkpoint.tensors, _header(path))
    branches: dict[Component, dict[str, Branch]] = {}
    for (component, module), parts in places.items():
        alpha = alphas[parts.pop("alpha").key] if "alpha" in parts else None
        branch = _branch(path, parts, alpha, settings, (component, module))
        branches.setdefault(component, {})[module] = branch
    return Lora(path, _digest(path, settings.side_file), branches)


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


def _alphas(path: Path, checkpoint: Checkpoint) -> dict[str, float]:
    """Return the values of the alphas by key: a few thousand numbers at most."""
    keys = [key for key in checkpoint.tensors if key.endswith(".alpha")]
    values: dict[str, float] = {}
    for key, tensor in checkpoint.read(keys):
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
                f"{path}: holds {name} ({key!r}), and only plain LoRA and LoCon are fused; merge it into the"
                " checkpoint with the tool that made it, or take a LoRA"
            )


def _sort(path: Path, infos: Mapping[str, TensorInfo]) -> dict[tuple[Component, str], dict[Part, TensorInfo]]:
    """Return the parts by component and module; every key has a place, or an error says which has not."""
    known = {key: split for key in infos if (split := split_key(key)) is not None}
    if not known:
        raise SourceError(f"{path}: is not a LoRA: no key ends in .lora_down.weight, .lora_A.weight or the like")
    places: dict[tuple[Component, str], dict[Part, TensorInfo]] = {}
    for key, info in infos.items():
        if key not in known:
            raise SourceError(f"{path}: {key!r} is no tensor of a LoRA, and nothing is left out; remove or convert it")
        spelled, part = known[key]
        place = place_module(spelled)
        if place is None:
            raise SourceError(
                f"{path}: LoRA for another model: {key!r} belongs to none of SDXL's {', '.join(COMPONENTS)}; use one"
                " that was trained on SDXL base"
            )
        parts = places.setdefault(place, {})
        if part in parts:
            raise SourceError(f"{path}: {key!r} and {parts[part].key!r} are of the same module; remove one of them")
        parts[part] = info
    return places


def _branch(
    path: Path,
    parts: Mapping[Part, TensorInfo],
    alpha: float | None,
    settings: AdapterSettings,
    place: tuple[Component, str],
) -> Branch:
    down, up, mid = parts.get("down"), parts.get("up"), parts.get("mid")
    if down is None or up is None:
        missing = "down" if down is None else "up"
        raise CorruptError(f"{path}: {place[0]} module {place[1]!r} lacks its {missing} weight; the LoRA is incomplete")
    tensors = (down, up) if mid is None else (down, mid, up)
    for info in tensors:
        if info.dtype not in _FLOATS or len(info.shape) not in {2, 4} or 0 in info.shape:
            raise CorruptError(f"{path}: {info.key!r} is {info.dtype} {list(info.shape)}, not the floats of a LoRA's"
                               " matrix or convolution")  # fmt: skip
    for first, second in itertools.pairwise(tensors):
        if second.shape[1] != first.shape[0]:
            raise CorruptError(f"{path}: {first.key!r} {list(first.shape)} and {second.key!r} {list(second.shape)} do"
                               " not chain; the LoRA is damaged")  # fmt: skip
    rank = down.shape[0]
    scaling = alpha / rank if alpha is not None else settings.scaling(*place, rank)
    return Branch(down, up, mid, scaling)


def _digest(path: Path, extra: bytes) -> str:
    try:
        digest = sha256_file(path)
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
    return hashlib.sha256(digest.encode() + extra).hexdigest() if extra else digest
