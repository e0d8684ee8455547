"""The settings that peft stores with an adapter, as far as they decide how strongly a LoRA is added."""

__all__ = ["AdapterSettings", "read_settings"]

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_trt.engines.errors import CorruptError, SourceError, explain_os_error
from sdxl_trt.export.lora_names import COMPONENTS, PEFT_ROOT, Component

_HEADER_KEY = "lora_adapter_metadata"
_SIDE_FILE = "adapter_config.json"
# What makes more of a branch than scaling · up @ down, and what also changes the base.
_BEYOND_LORA = ("use_dora", "fan_in_fan_out", "layer_replication", "lora_bias", "modules_to_save", "use_qalora")
_CHANGES_BASE = ("corda", "loftq", "olora", "pissa")
_REGEX = frozenset("*+?()[]{}|\\$^")


@dataclass(frozen=True)
class AdapterSettings:
    """Settings by component, empty where the file has none; `side_file` is what a file beside the LoRA added."""

    path: Path
    by_component: Mapping[Component, Mapping[str, Any]]
    side_file: bytes = b""

    def scaling(self, component: Component, module: str, rank: int) -> float:
        """Return alpha / r, or alpha / √r for a rank-stabilized LoRA; 1 without settings, as in diffusers."""
        settings = self.by_component[component]
        alpha = settings.get("lora_alpha")
        for pattern, own in (settings.get("alpha_pattern") or {}).items():
            if self._matches(pattern, module):
                alpha = own
                break
        if alpha is None:
            return 1.0
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CorruptError(
                f"{self.path}: lora_alpha {alpha!r} is no finite number; the LoRA's settings are damaged"
            )
        return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    def _matches(self, pattern: str, module: str) -> bool:
        # peft takes patterns as regular expressions; those of a stranger are not run, and trainers write plain names.
        name = pattern.removeprefix("^").replace("\\.", ".")
        if _REGEX & set(name):
            raise SourceError(f"{self.path}: alpha_pattern {pattern!r} is no module's name; save the LoRA with names")
        return module == name or (module.endswith(f".{name}") and not pattern.startswith("^"))


def read_settings(path: Path, keys: Iterable[str], header: Mapping[str, str]) -> AdapterSettings:
    """Return the settings in the `header` of the LoRA at `path`, or in adapter_config.json beside a file of peft's.

    Raises SourceError for settings that are not plain LoRA's, CorruptError for broken ones.
    """
    side = path.with_name(_SIDE_FILE)
    own = _parse(path, header[_HEADER_KEY]) if _HEADER_KEY in header else {}
    raw = b""
    if not own and side.is_file() and any(key.startswith(PEFT_ROOT) for key in keys):
        try:
            raw = side.read_bytes()
        except OSError as exc:
            raise explain_os_error(exc, f"reading {side}") from exc
    shared = _parse(side, raw) if raw else {}
    by_component = {component: _checked(path, _of(component, own) or shared) for component in COMPONENTS}
    return AdapterSettings(path, by_component, raw)


def _of(component: Component, settings: Mapping[str, Any]) -> dict[str, Any]:
    start = f"{component}."
    return {name.removeprefix(start): value for name, value in settings.items() if name.startswith(start)}


def _parse(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise CorruptError(f"{path}: the LoRA's settings are not JSON ({exc}); download it again") from exc
    if not isinstance(parsed, dict):
        raise CorruptError(f"{path}: the LoRA's settings are no JSON object; download it again")
    return parsed


def _checked(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    beyond = next((name for name in _BEYOND_LORA if settings.get(name)), None)
    start = settings.get("init_lora_weights")
    if beyond is None and isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        beyond = f"init_lora_weights {start!r}"
    if beyond is not None:
        raise SourceError(f"{path}: was trained with {beyond}, and only plain LoRA is fused; merge it with peft")
    if not isinstance(settings.get("alpha_pattern") or {}, dict):
        raise CorruptError(f"{path}: alpha_pattern is no JSON object; the LoRA's settings are damaged")
    return settings
