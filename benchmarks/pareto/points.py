"""The settings that are compared, each with the bundle and the provider that it draws with."""

__all__ = ["FULL", "POINTS", "PRESETS", "Point", "chosen"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from sdxl_trt.engines import UsageError
from sdxl_trt.runtime import PRESETS

BundleName = Literal["fp16", "int8", "int8 with decoder"]
FULL = "30 steps"
"""The run that all others are compared with."""


@dataclass(frozen=True)
class Point:
    """One way to draw: a kind of setting to compare among themselves, fields of the request, bundle and provider."""

    kind: str
    request: Mapping[str, Any] = field(default_factory=dict)
    bundle: BundleName = "fp16"
    provider: str = "ort-cpu"


def _steps(count: int, **more: Any) -> dict[str, Any]:
    return {"steps": count, **more}


POINTS: dict[str, Point] = {
    FULL: Point("fewer steps", _steps(30)),
    **{f"{count} steps": Point("fewer steps", _steps(count)) for count in (24, 20, 15, 12, 10)},
    **{f"{count} steps, cache {every}": Point(f"cache {every}", _steps(count, cache=every))
       for every, counts in ((2, (30, 24, 20, 15, 12)), (3, (30, 20, 15))) for count in counts},
    "30 steps, guided from 0 to 0.8": Point("guidance interval", _steps(30, guidance_interval=(0.0, 0.8))),
    "20 steps, guided from 0 to 0.8, cache 2": Point(
        "guidance interval", _steps(20, guidance_interval=(0.0, 0.8), cache=2)
    ),
    "int8, 30 steps": Point("int8", _steps(30), "int8"),
    "int8 with decoder, 20 steps, cache 2": Point("int8", _steps(20, cache=2), "int8 with decoder"),
    "OpenVINO, 30 steps": Point("OpenVINO", _steps(30), provider="openvino"),
    "20 steps, cache 2, tiny decoder": Point("tiny decoder", _steps(20, cache=2, vae="tiny")),
    **{f"--{name}, int8": Point("preset", dict(fields), "int8") for name, fields in PRESETS.items()},
    **{f"--{name}, OpenVINO": Point("preset", dict(fields), provider="openvino") for name, fields in PRESETS.items()},
}  # fmt: skip


def chosen(patterns: Sequence[str]) -> dict[str, Point]:
    """Return the points that match one of `patterns`, and the full run; all without patterns.

    Raises UsageError for a pattern that none matches.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in POINTS):
            raise UsageError(f"--only {pattern}: the settings are {'; '.join(POINTS)}")
    wanted = {FULL, *(name for name in POINTS for pattern in patterns or "*" if fnmatchcase(name, pattern))}
    return {name: point for name, point in POINTS.items() if name in wanted}
