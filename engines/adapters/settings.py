"""The settings that peft stores with an adapter and that affect the merged weights."""

__all__ = ["AdapterSettings", "read_settings"]

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from sdxl_trt.engines.adapters.kinds import Branch
from sdxl_trt.engines.adapters.names import COMPONENTS, PEFT_ROOT, LoraComponent
from sdxl_trt.engines.errors import CorruptError, SourceError
from sdxl_trt.engines.host import read_capped

_HEADER_KEY = "lora_adapter_metadata"
_SIDE_FILE = "adapter_config.json"
_TYPES = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr"}
# Settings with an effect beyond the branch's tensors, and initializations that also change the base.
_BEYOND_TENSORS = ("fan_in_fan_out", "layer_replication", "lora_bias", "modules_to_save", "use_qalora", "use_bdlora",
                   "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
                   "target_parameters", "trainable_token_indices")  # fmt: skip
_CHANGES_BASE = ("corda", "loftq", "lora_ga", "mica", "olora", "pissa")
_SHOWN = 80
_MOST_SETTINGS = 16 << 20  # a pattern for every module of SDXL takes about 100 kB
_REGEX = frozenset("*+?()[]{}|\\$^")


@dataclass(frozen=True)
class AdapterSettings:
    """Settings by component, empty if the file has none; `side_file` is the content of adapter_config.json, if used."""

    path: Path
    by_component: Mapping[LoraComponent, Mapping[str, Any]]
    side_file: bytes = b""
    _sorted: dict[tuple[LoraComponent, str], "_Patterns"] = field(default_factory=dict, init=False, compare=False)

    def scaling(self, branch: Branch) -> float:
        """Return alpha / r, or alpha / √r for a rank-stabilized LoRA; 1 without settings, as in diffusers.

        Raises CorruptError for broken settings.
        """
        settings = self.by_component[branch.place.component]
        if branch.kind == "difference" or not settings:
            return 1.0
        lora = branch.kind == "LoRA"
        alpha = self._number(branch, "lora_alpha" if lora else "alpha", "alpha_pattern")
        # peft's LoKr and LoHa divide by the rank in their settings even if nothing is low-rank.
        rank = branch.rank if lora else self._number(branch, "r", "rank_pattern")
        if alpha is None or rank is None:
            return 1.0
        return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    def check(self, branch: Branch) -> None:
        """Raise SourceError if the settings are for another kind of adapter than `branch`."""
        settings = self.by_component[branch.place.component]
        if branch.kind == "difference" or not settings:
            return
        kind = settings.get("peft_type", "LORA" if "lora_alpha" in settings else None)
        if kind is not None and _TYPES.get(str(kind).upper().rpartition(".")[2]) != branch.kind:
            raise SourceError(f"{self.path}: {branch.infos[0].key!r} is of a {branch.kind}, but the file's settings are"
                              f" for a {kind}; save the adapter again")  # fmt: skip
        if bool(settings.get("use_dora")) != ("magnitude" in branch.parts) and branch.kind == "LoRA":
            raise SourceError(f"{self.path}: use_dora is {bool(settings.get('use_dora'))} in the settings, but"
                              f" {branch.infos[0].key!r} has {'a' if 'magnitude' in branch.parts else 'no'} magnitude"
                              " vector; save the adapter again")  # fmt: skip

    def _number(self, branch: Branch, name: str, patterns: str) -> float | None:
        """Return the value of the first of the `patterns` that names the branch's module, else the setting `name`."""
        settings = self.by_component[branch.place.component]
        found = self._patterns(branch.place.component, patterns).value(branch.place.module)
        value = settings.get(name) if found is None else found[0]
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            raise CorruptError(f"{self.path}: {name} {repr(value)[:_SHOWN]} is not a finite number; the LoRA's settings"
                               " are damaged")  # fmt: skip
        if name == "r" and value <= 0:
            raise CorruptError(f"{self.path}: r {value!r} is not a rank; the LoRA's settings are damaged")
        return value

    def _patterns(self, component: LoraComponent, patterns: str) -> "_Patterns":
        if (component, patterns) not in self._sorted:
            given = self.by_component[component].get(patterns) or {}
            self._sorted[component, patterns] = _sort_patterns(self.path, patterns, given)
        return self._sorted[component, patterns]


@dataclass(frozen=True)
class _Patterns:
    """Values of modules by name, each with the place of its pattern: by the whole name, and by its last words."""

    whole: Mapping[str, tuple[int, Any]]
    ends: Mapping[str, tuple[int, Any]]

    def value(self, module: str) -> tuple[Any] | None:
        """Return the value of the first pattern that names `module`, in a tuple; None if none does."""
        words = module.split(".")
        found = [self.ends[end] for start in range(len(words)) if (end := ".".join(words[start:])) in self.ends]
        found += [self.whole[module]] if module in self.whole else []
        return (min(found, key=itemgetter(0))[1],) if found else None


def _sort_patterns(path: Path, patterns: str, given: Mapping[str, Any]) -> _Patterns:
    whole: dict[str, tuple[int, Any]] = {}
    ends: dict[str, tuple[int, Any]] = {}
    for place, (pattern, value) in enumerate(given.items()):
        # peft runs patterns as regular expressions; untrusted ones are not run here, and trainers write plain names.
        name = pattern.removeprefix("^").replace("\\.", ".")
        if _REGEX & set(name):
            raise SourceError(f"{path}: {patterns} {pattern[:_SHOWN]!r} is not a module's name; save the LoRA with"
                              " names")  # fmt: skip
        (whole if pattern.startswith("^") else ends).setdefault(name, (place, value))
    return _Patterns(whole, ends)


def read_settings(path: Path, keys: Iterable[str], header: Mapping[str, str]) -> AdapterSettings:
    """Return the settings in the `header` of the LoRA at `path`, or in adapter_config.json beside a peft file.

    Raises SourceError for unsupported settings, CorruptError for broken ones, UsageError for a file that is too large
    or cannot be read.
    """
    side = path.with_name(_SIDE_FILE)
    own = _parse(path, header[_HEADER_KEY]) if _HEADER_KEY in header else {}
    raw = b""
    if not own and side.is_file() and any(key.startswith(PEFT_ROOT) for key in keys):
        raw = read_capped(side, _MOST_SETTINGS, "reading")
    shared = _parse(side, raw) if raw else {}
    by_component = {component: _checked(path, _of(component, own) or shared) for component in COMPONENTS}
    return AdapterSettings(path, by_component, raw)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _of(component: LoraComponent, settings: Mapping[str, Any]) -> dict[str, Any]:
    start = f"{component}."
    return {name.removeprefix(start): value for name, value in settings.items() if name.startswith(start)}


def _parse(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise CorruptError(f"{path}: the LoRA's settings are not JSON ({exc}); download it again") from exc
    if not isinstance(parsed, dict):
        raise CorruptError(f"{path}: the LoRA's settings are not a JSON object; download it again")
    return parsed


def _checked(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    beyond = next((name for name in _BEYOND_TENSORS if settings.get(name)), None)
    start = settings.get("init_lora_weights")
    if beyond is None and isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        beyond = f"init_lora_weights {start!r}"
    if beyond is not None:
        raise SourceError(f"{path}: was trained with {beyond}, which is not supported; merge it with peft")
    for patterns in ("alpha_pattern", "rank_pattern"):
        if not isinstance(settings.get(patterns) or {}, dict):
            raise CorruptError(f"{path}: {patterns} is not a JSON object; the LoRA's settings are damaged")
    return settings
