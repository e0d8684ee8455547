"""Networks to plans: TensorRT's builder configured, its plan written as it comes, its memory figures read.

Flags are members of the module's enums: their numbers changed between versions.
"""

__all__ = ["PlanFile", "add_profiles", "configure", "memory_of", "save_timing_cache", "write_plan"]

import hashlib
import mmap
from pathlib import Path
from typing import Any, BinaryIO

from sdxl_trt.engines.build.network import BuildLog
from sdxl_trt.engines.bundle import BuildFlags, Flavour, PlanMemory, Profile
from sdxl_trt.engines.errors import EngineError, IncompatibleError, UsageError, explain_os_error
from sdxl_trt.engines.host import atomic_write

CHUNK = 16 << 20
_DEFAULT_LEVEL = 3


class PlanFile:
    """A plan on its way into an open file: counted and digested, so that nobody has to read gigabytes again."""

    def __init__(self, file: BinaryIO) -> None:
        self.size = 0
        self._file = file
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """The hex digest of what was written so far."""
        return self._digest.hexdigest()

    def write(self, data: Any) -> int:
        """Write a buffer without copying it, and return its size in bytes."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):
            chunk = view[start : start + CHUNK]
            self._digest.update(chunk)
            self._file.write(chunk)
        self.size += len(view)
        return len(view)


def configure(trt: Any, builder: Any, flavour: Flavour, flags: BuildFlags, timing_cache: Path | None) -> Any:
    """Return a builder config with `flags` set and the timing cache of an earlier build loaded, if there is one.

    Raises IncompatibleError for a flag that this TensorRT has not.
    """
    config = builder.create_builder_config()
    if hasattr(trt.BuilderFlag, "TF32"):
        # On by default, and then fp32 graphs are computed with 10 bits of mantissa: fp32 means fp32 here.
        config.clear_flag(trt.BuilderFlag.TF32)
    if flags.opt_level != _DEFAULT_LEVEL:
        config.builder_optimization_level = flags.opt_level
    if flags.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, flags.workspace)
    if flags.weight_streaming:
        config.set_flag(_member(trt.BuilderFlag, "WEIGHT_STREAMING", "--weight-streaming"))
    if flags.version_compatible:
        config.set_flag(_member(trt.BuilderFlag, "VERSION_COMPATIBLE", "--version-compatible"))
    # A plan of TensorRT for RTX runs on Ampere and later as it is.
    if flags.hardware_compatible and flavour == "tensorrt":
        levels = trt.HardwareCompatibilityLevel
        config.hardware_compatibility_level = _member(levels, "AMPERE_PLUS", "--hardware-compatible")
    if timing_cache is not None:
        _load_timing_cache(config, timing_cache)
    return config


def _member(enum: Any, name: str, option: str) -> Any:
    member = getattr(enum, name, None)
    if member is None:
        raise IncompatibleError(f"{option}: this version of TensorRT has no {name}; build without it, or upgrade it")
    return member


def _load_timing_cache(config: Any, path: Path) -> None:
    """Give `config` the cache at `path`, or an empty one where there is none that fits this device and version."""
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def save_timing_cache(config: Any, path: Path) -> None:
    """Write what the builder measured, over the cache that it was given. Raises one of our errors for an OSError."""
    cache = config.get_timing_cache()
    if cache is not None:
        with atomic_write(path) as file:
            file.write(memoryview(cache.serialize()).cast("B"))


def add_profiles(builder: Any, config: Any, network: Any, profiles: tuple[Profile, ...]) -> None:
    """Add one optimization profile each. Raises UsageError for shapes that the graph's inputs cannot have."""
    inputs = {tensor.name for tensor in (network.get_input(i) for i in range(network.num_inputs))}
    for profile in profiles:
        made = builder.create_optimization_profile()
        for name, (low, usual, high) in profile.shapes.items():
            if name not in inputs:
                raise UsageError(f"the profile names an input {name!r}, the graph has {', '.join(sorted(inputs))};"
                                 " export it again")  # fmt: skip
            try:
                made.set_shape(name, low, usual, high)
            except ValueError as exc:
                raise UsageError(f"the profile's {name} of {low}, {usual}, {high} is none: {exc}") from exc
        if not made or config.add_optimization_profile(made) < 0:
            raise UsageError(f"TensorRT takes no profile of {profile.shapes}; choose other sizes")


def write_plan(trt: Any, builder: Any, network: Any, config: Any, plan: PlanFile) -> bool:
    """Build, and write the plan to `plan`; return whether there is one. Raises OSError where it cannot be written.

    Through a stream where TensorRT has one: the plan is then never whole in memory. A library older than its binding
    reports success there having written nothing, and builds the plan in its own memory, from where it is written.
    """
    if hasattr(builder, "build_serialized_network_to_stream"):
        writer = _stream_writer(trt, plan)
        done = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.failure is not None:
            raise writer.failure
        if plan.size or not done:
            return bool(done)
    memory = builder.build_serialized_network(network, config)
    return memory is not None and plan.write(memory) > 0


def _stream_writer(trt: Any, plan: PlanFile) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc] # the base is known at run time only
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.failure: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return plan.write(data)
            except OSError as exc:  # C++ cannot unwind it, and takes a short count for the end
                self.failure = exc
                return 0

    return Writer()


def memory_of(trt: Any, logger: Any, log: BuildLog, file: BinaryIO, flags: BuildFlags) -> PlanMemory:
    """Return what the plan in `file` needs on the device, as the builder logged it, or else as its engine states it.

    Without an engine all weights of a plan built for weight streaming count as streamable, which is an upper bound.
    Raises EngineError where neither is to be had.
    """
    size = file.seek(0, 2)
    if log.activations is not None:
        weights = size if log.weights is None else log.weights
        return PlanMemory(
            weights=weights, activations=log.activations, streamable=weights if flags.weight_streaming else 0
        )
    with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as content:
        engine = trt.Runtime(logger).deserialize_cuda_engine(content)
    if engine is None:
        raise EngineError("TensorRT did not say how much memory the plan's activations take, and without it nothing can"
                          " be planned; report this with the build log")  # fmt: skip
    streamable = engine.streamable_weights_size
    return PlanMemory(weights=size, activations=engine.device_memory_size_v2, streamable=streamable)
