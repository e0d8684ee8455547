"""Plans of a bundle: where they lie, which one fits this machine, and why one does not.

A plan is executable code. It is used only where the manifest vouches for its bytes and its key is, part by part,
what this machine and the bundle's graphs come to; nothing is rebuilt in silence.
"""

__all__ = [
    "PLANS",
    "Limits",
    "close_to_others",
    "find_plan",
    "has_plans",
    "plan_limits",
    "plan_path",
    "read_plan",
    "rebuild_command",
    "why_rebuild",
]

import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from sdxl_trt.engines.bundle import MANIFEST, Bundle
from sdxl_trt.engines.errors import CorruptError, IncompatibleError, ResourceError, SizeError, explain_os_error
from sdxl_trt.engines.manifest import Component, Stage
from sdxl_trt.engines.path_texts import shell_word
from sdxl_trt.engines.plan_records import ANY, BuildFlags, Environment, Flavour, PlanKey, PlanRecord
from sdxl_trt.engines.profiles import Profile, Range
from sdxl_trt.engines.records import Positive, Record

PLANS = "plans"
_DIGITS = 12
_CHUNK = 64 << 20


class Limits(Record, frozen=True, kw_only=True):
    """What the plans of a bundle take: picture sides in pixels, pictures at once, prompt tokens.

    A call of fewer pictures than `fewest`, more than 1 where a plan was built for one batch size, has to be filled up.
    """

    height: Range
    width: Range
    pictures: Positive
    tokens: Range
    fewest: Positive = 1
    flavour: Flavour = "tensorrt"

    def check(self, width: int, height: int) -> None:
        """Raise SizeError for a picture of `width` x `height` pixels that no plan takes."""
        for option, side, sides in (("--width", width, self.width), ("--height", height, self.height)):
            if side not in sides:
                near = sides.min if side < sides.min else sides.max
                raise SizeError(
                    f"{option} {side}: the plans were built for {sides.min} to {sides.max}; try {near}, or build plans"
                    f" for it: export-engines --engine {self.flavour} {option} {side} --out BUNDLE"
                )


def plan_path(key: PlanKey) -> str:
    """Return the file of a plan with this key, relative to the bundle."""
    return f"{PLANS}/{key.component}-{key.environment.flavour}-{key.digest()[:_DIGITS]}.plan"


def has_plans(bundle: Bundle, flavour: Flavour) -> bool:
    """Return whether the bundle has any plan of this flavour, whether or not it fits this machine."""
    return any(record.key.environment.flavour == flavour for record in bundle.manifest.plans)


def rebuild_command(bundle: Bundle, flavour: Flavour) -> str:
    """Return the command that builds what is missing or stale."""
    return f"export-engines --engine {flavour} --out {shell_word(bundle.root)}"


def find_plan(bundle: Bundle, name: str, environment: Environment) -> PlanRecord:
    """Return the plan of component `name` that was built for `environment`.

    Raises IncompatibleError that says what differs, and the command that mends it, where there is none.
    """
    flavour = environment.flavour
    records = [
        record
        for record in bundle.manifest.plans
        if record.key.component == name and record.key.environment.flavour == flavour
    ]
    command = rebuild_command(bundle, flavour)
    if not records:
        raise IncompatibleError(f"{bundle.root}: has no {flavour} plan of {name}; build it with: {command}")
    component = bundle.manifest.components[name]
    reasons = [why_rebuild(record, component, environment) for record in records]
    for record, differences in zip(records, reasons, strict=True):
        if not differences:
            return record
    nearest = min(reasons, key=len)
    raise IncompatibleError(
        f"{bundle.root}: the {flavour} plan of {name} does not fit: {'; '.join(nearest)}; build it again with:"
        f" {command}"
    )


def why_rebuild(
    record: PlanRecord,
    component: Component,
    environment: Environment,
    wanted: tuple[tuple[Profile, ...], BuildFlags] | None = None,
) -> list[str]:
    """Return what makes the plan of `record` wrong for `component` on a machine of `environment`, a sentence each.

    With `wanted`, profiles and flags must be those too; without, a plan is taken with what it was built for.
    """
    key, here = record.key, environment
    built, flags = key.environment, key.flags
    reasons = []
    if key.graph != component.graph.sha256:
        reasons.append("the graph has been exported anew since the plan was built")
    if key.weights != component.weights.sha256:
        reasons.append("the weights are not those that the plan was built with")
    if built.flavour != here.flavour:
        reasons.append(f"it is a {built.flavour} plan, {here.flavour} is asked for")
    if not _version_fits(built, here, flags):
        reasons.append(f"TensorRT is {here.tensorrt}, the plan was built with {built.tensorrt}")
    reasons += _device_reasons(built, here, flags)
    if built.platform != here.platform:
        reasons.append(f"the platform is {here.platform}, the plan was built on {built.platform}")
    if wanted is not None and wanted[0] != key.profiles:
        reasons.append("other sizes are asked for")
    if wanted is not None and wanted[1] != flags:
        reasons.append("other build options are asked for")
    return reasons


def _version_fits(built: Environment, here: Environment, flags: BuildFlags) -> bool:
    if flags.version_compatible:
        # Version-compatible plans run on their own and on later minor versions of the same major one.
        return built.tensorrt.split(".")[0] == here.tensorrt.split(".")[0] and _release(built) <= _release(here)
    return built.tensorrt == here.tensorrt


def _release(environment: Environment) -> tuple[int, ...]:
    return tuple(int(part) for part in environment.tensorrt.split(".") if part.isdecimal())


def _device_reasons(built: Environment, here: Environment, flags: BuildFlags) -> list[str]:
    """Return what differs in the device; `hardware_compatible` plans run on every GPU from Ampere on."""
    if flags.hardware_compatible:
        older = here.compute_capability != ANY and float(here.compute_capability) < 8.0
        return [f"the GPU has compute capability {here.compute_capability}, the plan needs 8.0"] if older else []
    pairs = (
        ("GPU", built.gpu, here.gpu),
        ("compute capability", built.compute_capability, here.compute_capability),
        ("driver", built.driver, here.driver),
    )
    return [f"the {what} is {now}, the plan was built for {then}" for what, then, now in pairs
            if ANY not in (then, now) and then != now]  # fmt: skip


def read_plan(bundle: Bundle, record: PlanRecord, progress: Callable[[int], None] | None = None) -> memoryview:
    """Return the bytes of a plan, read once and checked in the buffer that is returned; the caller owns it.

    `progress` is told the bytes of each chunk. Raises CorruptError where the file is not what the manifest vouches
    for, or where others than this user could have written it; ResourceError where it does not fit into memory.
    """
    path = bundle.path(record.file)
    for place in (bundle.root, bundle.root / MANIFEST, path.parent, path):
        _check_private(place)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.file.size:
                raise _damaged(bundle, record, f"{size} bytes, but the manifest says {record.file.size}")
            buffer = np.empty(size, np.uint8).data
            digest = hashlib.sha256()
            for start in range(0, size, _CHUNK):
                part = buffer[start : start + _CHUNK]
                if file.readinto(part) != len(part):
                    raise _damaged(bundle, record, "it became shorter while it was read")
                digest.update(part)
                if progress:
                    progress(len(part))
    except MemoryError as exc:
        raise ResourceError(f"reading {path}: out of host memory ({record.file.size / 1e9:.1f} GB);"
                            " close other programs") from exc  # fmt: skip
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
    if digest.hexdigest() != record.file.sha256:
        raise _damaged(bundle, record, "its sha256 is not the manifest's")
    return buffer


def _damaged(bundle: Bundle, record: PlanRecord, reason: str) -> CorruptError:
    command = rebuild_command(bundle, record.key.environment.flavour)
    return CorruptError(f"{bundle.path(record.file)}: {reason}; the plan is damaged: build it again with: {command}")


def close_to_others(path: Path) -> None:
    """Take the permission to write `path` from everybody but its owner: whatever the umask, plans are code."""
    try:
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
    except OSError as exc:
        raise explain_os_error(exc, f"writing {path}") from exc


def _check_private(path: Path) -> None:
    """Raise CorruptError where others could have put code into a plan, or vouched for it."""
    try:
        status = path.stat()
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CorruptError(f"{path}: others may write it, and plans are code that would run here; chmod go-w it, or"
                           " build plans in a folder of your own")  # fmt: skip
    if status.st_uid not in (0, os.getuid()):
        raise CorruptError(f"{path}: belongs to another user, and plans are code that would run here; copy the bundle"
                           " to a folder of your own")  # fmt: skip


def plan_limits(bundle: Bundle, records: Iterable[PlanRecord]) -> Limits | None:
    """Return what the plans `records` take, as far as they are of UNets; None where none is."""
    stages = {stage.unet: stage for stage in bundle.manifest.stages().values()}
    each = [_unet_limits(record, stages[record.key.component]) for record in records if record.key.component in stages]
    if not each:
        return None
    return Limits(
        height=_common([limits.height for limits in each]),
        width=_common([limits.width for limits in each]),
        pictures=min(limits.pictures for limits in each),
        fewest=max(limits.fewest for limits in each),
        tokens=_common([limits.tokens for limits in each]),
        flavour=each[0].flavour,
    )


def _unet_limits(record: PlanRecord, stage: Stage) -> Limits:
    samples = [profile.shapes["sample"] for profile in record.key.profiles]
    contexts = [profile.shapes["encoder_hidden_states"] for profile in record.key.profiles]

    def span(shapes: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]], axis: int) -> Range:
        low, usual, high = (min, max, max)
        return Range(
            min=low(shape[0][axis] for shape in shapes),
            opt=usual(shape[1][axis] for shape in shapes),
            max=high(shape[2][axis] for shape in shapes),
        )

    rows = span(samples, 0)
    return Limits(
        height=span(samples, 2).times(stage.vae.factor),
        width=span(samples, 3).times(stage.vae.factor),
        pictures=max(rows.max // 2, 1),
        fewest=rows.min,
        tokens=span(contexts, 1),
        flavour=record.key.environment.flavour,
    )


def _common(ranges: list[Range]) -> Range:
    low, high = max(each.min for each in ranges), min(each.max for each in ranges)
    if low > high:
        raise IncompatibleError("the plans of base and refiner have no size in common; build them together")
    return Range(min=low, opt=min(max(ranges[0].opt, low), high), max=high)
