"""Presets: named settings that draw faster. `make bench-pareto` compares their pictures with the full run's."""

__all__ = ["PRESETS", "preset_options"]

from collections.abc import Mapping
from typing import Any

from sdxl_trt.runtime.request import Request, settings_of

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"steps": 20, "cache": 2},
    "fastest": {"steps": 15, "cache": 2},
}
"""Settings of a request by the name of the preset; each is an option of trt-generate."""


def preset_options(name: str) -> list[str]:
    """Return the options of trt-generate that a preset stands for."""
    declared = settings_of(Request)
    return [text for setting, value in PRESETS[name].items() for text in (declared[setting].word, f"{value}")]
