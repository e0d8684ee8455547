"""Networks to plans: configure TensorRT's builder, stream its plan to a file, read its memory figures.

Flags are looked up by name in the module's enums: their numbers changed between versions.
"""

__all__ = ["PlanFile", "add_profiles", "configure", "memory_of", "write_plan"]

import hashlib
import mmap
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

from sdxl_trt.engines.build.network import BuildLog
from sdxl_trt.engines.bundle import BuildFlags, Chunks, Flavour, PlanMemory, Profile, Range, Shape, is_slot_input
from sdxl_trt.engines.errors import EngineError, IncompatibleError, UsageError

CHUNK = 16 << 20
_DEFAULT_LEVEL = 3


class PlanFile:
    """An open file that a plan is written to; counts and digests the bytes, so that they need not be read again.

    The whole file has a digest, and so does every chunk of CHUNK bytes, however the writes are divided.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.size = 0
        self._file = file
        self._digest = hashlib.sha256()
        self._chunk = hashlib.sha256()
        self._complete: list[str] = []

    @property
    def sha256(self) -> str:
        """The hex digest of the bytes written so far."""
        return self._digest.hexdigest()

    @property
    def chunks(self) -> Chunks:
        """The hex digests of the chunks written so far, the last of which may be incomplete."""
        rest = (self._chunk.hexdigest(),) if self.size % CHUNK else ()
        return Chunks(size=CHUNK, sha256=(*self._complete, *rest))

    def write(self, data: Any) -> int:
        """Write a buffer without copying it, and return its size in bytes."""
        view = memoryview(data).cast("B")
        start = 0
        while start < len(view):
            part = view[start : start + CHUNK - self.size % CHUNK]
            self._write_part(part)
            start += len(part)
        return len(view)

    def _write_part(self, part: memoryview) -> None:
        """Write bytes that do not cross the end of a chunk."""
        self._digest.update(part)
        self._chunk.update(part)
        self._file.write(part)
        self.size += len(part)
        if self.size % CHUNK == 0:
            self._complete.append(self._chunk.hexdigest())
            self._chunk = hashlib.sha256()


def configure(trt: Any, builder: Any, flavour: Flavour, flags: BuildFlags) -> Any:
    """Return a builder config with `flags`. Raises IncompatibleError for a flag this TensorRT does not support."""
    config = builder.create_builder_config()
    if hasattr(trt.BuilderFlag, "TF32"):
        # TF32 is on by default and computes fp32 graphs with a 10-bit mantissa; here fp32 means fp32.
        config.clear_flag(trt.BuilderFlag.TF32)
    if flags.opt_level != _DEFAULT_LEVEL:
        config.builder_optimization_level = flags.opt_level
    if flags.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, flags.workspace)
    if flags.weight_streaming:
        config.set_flag(_member(trt.BuilderFlag, "WEIGHT_STREAMING", "--weight-streaming"))
    if flags.version_compatible:
        config.set_flag(_member(trt.BuilderFlag, "VERSION_COMPATIBLE", "--version-compatible"))
    _set_hardware_compatibility(trt, config, flavour, flags)
    return config


def _set_hardware_compatibility(trt: Any, config: Any, flavour: Flavour, flags: BuildFlags) -> None:
    level = "AMPERE_PLUS" if flags.hardware_compatible else "SAME_COMPUTE_CAPABILITY"
    # Plans of TensorRT for RTX run on Ampere and later without a flag.
    if flavour == "tensorrt" and (flags.hardware_compatible or flags.same_compute_capability):
        config.hardware_compatibility_level = _member(trt.HardwareCompatibilityLevel, level, "--hardware-compatible")


def _member(enum: Any, name: str, option: str) -> Any:
    member = getattr(enum, name, None)
    if member is None:
        raise IncompatibleError(f"{option}: this version of TensorRT has no {name}; build without it, or upgrade it")
    return member


def add_profiles(
    builder: Any, config: Any, network: Any, profiles: tuple[Profile, ...], lora_rank: Range | None = None
) -> None:
    """Add an optimization profile for each of `profiles`; in each of them, `lora_rank` is the rank of all slots.

    Raises UsageError for shapes that do not fit the inputs.
    """
    inputs = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))}
    slots = {} if lora_rank is None else _slot_shapes(inputs, lora_rank)
    for profile in profiles:
        made = builder.create_optimization_profile()
        for name, shapes in {**profile.shapes, **slots}.items():
            if name not in inputs:
                raise UsageError(f"the profile names an input {name!r}, the graph has {_some(inputs)}; export it again")
            _set_shape(made, name, shapes)
        if not made or config.add_optimization_profile(made) < 0:
            raise UsageError(f"TensorRT rejects the profile {profile.shapes}; choose other sizes")


def _slot_shapes(inputs: Mapping[str, Shape], rank: Range) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Return the shapes of the slots among `inputs`, whose only axis that varies is the rank."""
    return {
        name: (_with_rank(shape, rank.min), _with_rank(shape, rank.opt), _with_rank(shape, rank.max))
        for name, shape in inputs.items()
        if is_slot_input(name)
    }


def _with_rank(shape: Shape, rank: int) -> Shape:
    return tuple(rank if size < 0 else size for size in shape)


def _set_shape(profile: Any, name: str, shapes: tuple[Shape, Shape, Shape]) -> None:
    low, usual, high = shapes
    try:
        profile.set_shape(name, low, usual, high)
    except ValueError as exc:
        raise UsageError(f"the profile's {name} of {low}, {usual}, {high} is invalid: {exc}") from exc


def _some(names: Iterable[str]) -> str:
    """Return the names of the inputs without those of slots, of which there may be thousands."""
    return ", ".join(sorted(name for name in names if not is_slot_input(name)))


def write_plan(trt: Any, builder: Any, network: Any, config: Any, plan: PlanFile) -> bool:
    """Build the plan and write it to `plan`; return whether the build succeeded. Raises OSError if writing fails.

    Uses TensorRT's stream writer if it has one, so that the plan is never whole in memory. A library older than its
    binding reports success there without writing anything; the plan is then built in memory and written from there.
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
            except OSError as exc:  # C++ cannot unwind it; a short count ends the build
                self.failure = exc
                return 0

    return Writer()


def memory_of(
    trt: Any, logger: Any, log: BuildLog, file: BinaryIO, flags: BuildFlags, *, profiles: int = 1
) -> PlanMemory:
    """Return the device memory of the plan in `file`: the builder's logged figures, or else those of its engine.

    The engine is asked unless the log has a figure for each of the `profiles`; where it cannot be loaded, the largest
    logged figure counts for all. Logged figures count all weights of a plan built for weight streaming as streamable,
    which is an upper bound. Raises EngineError if neither is available.
    """
    size = file.seek(0, 2)
    weights = size if log.weights is None else log.weights
    each = tuple(log.activations)
    streamable = weights if flags.weight_streaming else 0
    if len(each) != profiles:
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as content:
            engine = trt.Runtime(logger).deserialize_cuda_engine(content)
        if engine is not None:
            return _engine_memory(engine, weights, profiles)
        if not each:
            raise EngineError("TensorRT did not state the memory of the plan's activations, which the memory plan"
                              " needs; report this with the build log")  # fmt: skip
    stated = each if len(each) == profiles else ()
    return PlanMemory(weights=weights, activations=max(each), streamable=streamable, profile_activations=stated)


def _engine_memory(engine: Any, weights: int, profiles: int) -> PlanMemory:
    return PlanMemory(
        weights=weights,
        activations=int(engine.device_memory_size_v2),
        streamable=int(engine.streamable_weights_size),
        profile_activations=tuple(int(engine.get_device_memory_size_for_profile_v2(i)) for i in range(profiles)),
    )
