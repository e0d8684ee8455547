"""The records of a build: its job, its events, its result, and the messages of its process."""

__all__ = ["BuildEvent", "BuildJob", "BuildPhase", "BuiltPlan", "Made", "Message", "Refused"]

from pathlib import Path

from sdxl_trt.engines.bundle import BuildFlags, Chunks, Flavour, Natural, Positive, Profile, Range, Record, Sha256


class BuildJob(Record, frozen=True, kw_only=True):
    """One plan to build: `graph` is a ``model.onnx`` with its weights beside it, `plan` and `log` are output files.

    `lora_rank` is the range of the rank of all slots, None for a graph without slots; `profiles` leave the slots out.
    `timing_cache` is read if it exists, and written after the build. A `shared_cache` is the one in the cache folder,
    not a file that the user named: if it cannot be used or written, the log says so and the build goes on. With
    `list_layers` the log also lists the plan's layers with the types of their inputs, constants and outputs.
    """

    component: str
    graph: Path
    profiles: tuple[Profile, ...]
    flavour: Flavour
    plan: Path
    log: Path
    flags: BuildFlags = BuildFlags()
    lora_rank: Range | None = None
    timing_cache: Path | None = None
    shared_cache: bool = False
    list_layers: bool = False


class BuildEvent(Record, frozen=True, kw_only=True):
    """Progress of a build: TensorRT's current phase, and the share that is done (0 to 1, None if unknown).

    `seconds` is the time since the build began, `resident` the bytes that its process holds (0 if unknown).
    """

    component: str
    phase: str
    share: float | None
    seconds: float
    resident: int


class BuiltPlan(Record, frozen=True, kw_only=True):
    """A finished plan: sizes and memory in bytes, times in seconds.

    `activations` is the builder's figure for the largest shapes of any profile, `profile_activations` those of each
    profile in order (empty if unknown). `peak_anonymous` and `peak_file` are sampled peaks of the build process: memory
    that it needs, and file pages that the kernel may drop.
    """

    component: str
    plan: Path
    size: Positive
    sha256: Sha256
    chunks: Chunks
    activations: Natural
    profile_activations: tuple[Natural, ...] = ()
    weights: Natural
    streamable: Natural
    seconds: float
    parse_seconds: float
    layers: Positive
    peak_anonymous: Natural
    peak_file: Natural


class BuildPhase(Record, frozen=True, kw_only=True, tag="phase"):
    """Sent by the build process when its phase changes."""

    phase: str
    share: float | None = None


class Made(Record, frozen=True, kw_only=True, tag="made"):
    """Sent by the build process at the end: the size and digests of the plan, and the builder's figures."""

    size: Natural
    sha256: Sha256
    chunks: Chunks
    activations: Natural
    profile_activations: tuple[Natural, ...] = ()
    weights: Natural
    streamable: Natural
    parse_seconds: float
    layers: Natural


class Refused(Record, frozen=True, kw_only=True, tag="refused"):
    """Sent by the build process on failure: the class name of an SdxlTrtError, and its message."""

    error: str
    message: str


Message = BuildPhase | Made | Refused
