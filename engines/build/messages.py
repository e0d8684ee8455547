"""What a build is asked for, what it says while it runs, and what comes of it."""

__all__ = ["BuildEvent", "BuildJob", "BuildPhase", "BuiltPlan", "Made", "Message", "Refused"]

from pathlib import Path

from sdxl_trt.engines.bundle import BuildFlags, Flavour, Natural, Positive, Profile, Record, Sha256


class BuildJob(Record, frozen=True, kw_only=True):
    """One plan to build: `graph` is a ``model.onnx`` with its weights beside it, `plan` and `log` are written.

    A `timing_cache` is read if it is there, and written again after the build.
    """

    component: str
    graph: Path
    profiles: tuple[Profile, ...]
    flavour: Flavour
    plan: Path
    log: Path
    flags: BuildFlags = BuildFlags()
    timing_cache: Path | None = None


class BuildEvent(Record, frozen=True, kw_only=True):
    """A sign of life: what TensorRT says that it is doing, how much of it is done (0 to 1, None where unknown).

    `seconds` have passed since the build began; its process holds `resident` bytes (0 where that cannot be seen).
    """

    component: str
    phase: str
    share: float | None
    seconds: float
    resident: int


class BuiltPlan(Record, frozen=True, kw_only=True):
    """A plan that was built: sizes and memory in bytes, times in seconds.

    `activations` are the builder's figure for the largest shapes of any profile. `peak_anonymous` and `peak_file`
    are the building process's, sampled: memory that it must have, and pages of files that the kernel may drop.
    """

    component: str
    plan: Path
    size: Positive
    sha256: Sha256
    activations: Natural
    weights: Natural
    streamable: Natural
    seconds: float
    parse_seconds: float
    layers: Positive
    peak_anonymous: Natural
    peak_file: Natural


class BuildPhase(Record, frozen=True, kw_only=True, tag="phase"):
    """Said by the building process whenever it turns to something else."""

    phase: str
    share: float | None = None


class Made(Record, frozen=True, kw_only=True, tag="made"):
    """Said by the building process at the end: what it wrote, and what the builder said of it."""

    size: Natural
    sha256: Sha256
    activations: Natural
    weights: Natural
    streamable: Natural
    parse_seconds: float
    layers: Natural


class Refused(Record, frozen=True, kw_only=True, tag="refused"):
    """Said by the building process instead: the name of one of our errors, and its message."""

    error: str
    message: str


Message = BuildPhase | Made | Refused
