"""The builder is configured with the module's own names; its plan is written once, completely, and digested."""

import hashlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.build import builder
from sdxl_trt.engines.build.builder import PlanFile, add_profiles, configure, memory_of, write_plan
from sdxl_trt.engines.build.network import BuildLog
from sdxl_trt.engines.bundle.plan_record import BuildFlags, Chunks, PlanMemory
from sdxl_trt.engines.bundle.profile import Profile, Range
from sdxl_trt.engines.errors import EngineError, IncompatibleError, UsageError

PLAN = bytes(range(256)) * (1 << 17)


def test_a_plan_is_counted_and_digested_as_it_is_written() -> None:
    file = io.BytesIO()
    plan = PlanFile(file)
    assert plan.write(PLAN) == len(PLAN) > 16 << 20
    assert plan.write(memoryview(b"tail")) == 4
    assert file.getvalue() == PLAN + b"tail"
    assert (plan.size, plan.sha256) == (len(PLAN) + 4, hashlib.sha256(PLAN + b"tail").hexdigest())


@given(st.lists(st.binary(max_size=50), max_size=12))
@settings(max_examples=40, deadline=None)
def test_chunks_are_digested_however_the_writes_are_divided(pieces: list[bytes]) -> None:
    content, size = b"".join(pieces), 16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "CHUNK", size)
        plan = PlanFile(io.BytesIO())
        for piece in pieces:
            plan.write(piece)
        chunks = plan.chunks
    parts = [content[start : start + size] for start in range(0, len(content), size)]
    assert chunks == Chunks(size=size, sha256=tuple(hashlib.sha256(part).hexdigest() for part in parts))
    assert chunks.fit(len(content))
    assert not chunks.fit(len(content) + size)
    assert plan.sha256 == hashlib.sha256(content).hexdigest()


class Config:
    """A builder config: attributes exist only once they are set."""

    def __init__(self) -> None:
        self.flags: list[str] = []
        self.pools: list[tuple[str, int]] = []
        self.profiles: list[Any] = []

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.pools.append((pool, size))

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1


TRT = SimpleNamespace(
    BuilderFlag=SimpleNamespace(WEIGHT_STREAMING="streaming", VERSION_COMPATIBLE="versions"),
    HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="ampere+", SAME_COMPUTE_CAPABILITY="same"),
    MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
    IStreamWriter=type("IStreamWriter", (), {}),
)
ALL = BuildFlags(
    opt_level=5, workspace=1 << 30, weight_streaming=True, version_compatible=True, hardware_compatible=True
)


def _configure(flags: BuildFlags, flavour: Any = "tensorrt", trt: Any = TRT) -> Config:
    config: Config = configure(trt, SimpleNamespace(create_builder_config=Config), flavour, flags)
    return config


def test_the_defaults_are_left_to_tensorrt() -> None:
    config = _configure(BuildFlags())
    assert vars(config) == vars(Config())


def test_every_flag_is_set() -> None:
    config = _configure(ALL)
    assert vars(config) == vars(Config()) | {
        "flags": ["streaming", "versions"],
        "pools": [("workspace", 1 << 30)],
        "builder_optimization_level": 5,
        "hardware_compatibility_level": "ampere+",
    }


def test_rtx_plans_need_no_flag_for_other_hardware() -> None:
    for flags in (ALL, BuildFlags(same_compute_capability=True)):
        assert not hasattr(_configure(flags, "tensorrt-rtx"), "hardware_compatibility_level")


def test_plans_for_one_compute_capability_have_their_own_level() -> None:
    flags = BuildFlags(same_compute_capability=True)
    assert vars(_configure(flags)) == vars(Config()) | {"hardware_compatibility_level": "same"}
    both = msgspec.structs.replace(flags, hardware_compatible=True)
    assert _configure(both).hardware_compatibility_level == "ampere+"  # type: ignore[attr-defined]


def test_an_unsupported_flag_is_named() -> None:
    trt = SimpleNamespace(**vars(TRT) | {"BuilderFlag": SimpleNamespace()})
    with pytest.raises(IncompatibleError, match="--weight-streaming: this version of TensorRT has no WEIGHT_STREAMING"):
        _configure(ALL, trt=trt)


class OneProfile:
    """An optimization profile; TensorRT's are false if their shapes contradict each other."""

    def __init__(self, *, sound: bool = True) -> None:
        self.shapes: dict[str, Any] = {}
        self.sound = sound

    def __bool__(self) -> bool:
        return self.sound

    def set_shape(self, name: str, *shapes: Any) -> None:
        if shapes[0] > shapes[2]:
            raise ValueError("inconsistent")
        self.shapes[name] = shapes


INPUTS = [("sample", (-1, 4)), ("a.lora_down", (1, 8, -1)), ("a.lora_up", (1, -1, 6)), ("b.lora_down", (-1, 72))]
NETWORK = SimpleNamespace(
    num_inputs=len(INPUTS), get_input=lambda i: SimpleNamespace(name=INPUTS[i][0], shape=INPUTS[i][1])
)


def _add(shapes: dict[str, Any], *, sound: bool = True, lora_rank: Range | None = None) -> Config:
    config = Config()
    builder = SimpleNamespace(create_optimization_profile=lambda: OneProfile(sound=sound))
    add_profiles(builder, config, NETWORK, (Profile(shapes=shapes), Profile(shapes=shapes)), lora_rank)
    return config


def test_profiles_are_added_in_order() -> None:
    shapes = {"sample": ((1, 4), (2, 4), (3, 4))}
    assert [profile.shapes for profile in _add(shapes).profiles] == [shapes, shapes]


def test_slots_have_the_rank_in_every_profile() -> None:
    shapes = {"sample": ((1, 4), (2, 4), (3, 4))}
    first, second = _add(shapes, lora_rank=Range(min=1, opt=16, max=64)).profiles
    assert first.shapes == second.shapes == shapes | {
        "a.lora_down": ((1, 8, 1), (1, 8, 16), (1, 8, 64)), "a.lora_up": ((1, 1, 6), (1, 16, 6), (1, 64, 6)),
        "b.lora_down": ((1, 72), (16, 72), (64, 72)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shapes", "sound", "said"),
    [
        ({"sample": ((3,), (2,), (1,))}, True, "the profile's sample of .* is invalid: inconsistent"),
        ({"latents": ((1,), (1,), (1,))}, True, "names an input 'latents', the graph has sample"),
        ({"sample": ((1,), (1,), (1,))}, False, "TensorRT rejects the profile"),
    ],
)
def test_an_invalid_profile_is_named(shapes: dict[str, Any], sound: bool, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        _add(shapes, sound=sound)


class Builder:
    """A builder that returns `plan`; `streams` are the pieces that it streams, None if it cannot stream."""

    def __init__(self, plan: bytes | None = None, streams: list[bytes] | None = None, *, done: bool = True) -> None:
        self.plan, self.builds = plan, 0
        if streams is not None:
            self.build_serialized_network_to_stream = self._stream
        self.streams, self.done = streams or [], done

    def _stream(self, network: Any, config: Any, writer: Any) -> bool:
        return all(writer.write(piece) == len(piece) for piece in self.streams) and self.done

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        self.builds += 1
        return self.plan


@pytest.mark.parametrize(
    ("builder", "written", "success"),
    [
        (Builder(b"whole"), b"whole", True),
        (Builder(b"whole", [b"in ", b"pieces"]), b"in pieces", True),
        # A library without the call reports success and has written nothing.
        (Builder(b"whole", []), b"whole", True),
        (Builder(b"", []), b"", False),
        (Builder(None, []), b"", False),
        (Builder(None), b"", False),
        (Builder(b"whole", [b"half"], done=False), b"half", False),
        (Builder(b"whole", [], done=False), b"", False),
    ],
    ids=["memory", "stream", "fallback", "empty", "nothing", "none", "half", "failed"],
)
def test_a_plan_is_written_once_or_not_at_all(builder: Builder, written: bytes, success: bool) -> None:
    file = io.BytesIO()
    assert write_plan(TRT, builder, None, None, PlanFile(file)) is success
    assert file.getvalue() == written
    assert builder.builds == (written != b"in pieces" and builder.done)


class Full(io.BytesIO):
    """A file on a full disk."""

    def write(self, data: Any) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("builder", [Builder(b"whole"), Builder(None, [b"piece"])], ids=["memory", "stream"])
def test_a_full_disk_raises_the_os_error(builder: Builder) -> None:
    """C++ would drop an exception raised in a callback."""
    with pytest.raises(OSError, match="No space left"):
        write_plan(TRT, builder, None, None, PlanFile(Full()))


def _memory(log: BuildLog, engine: Any, flags: BuildFlags, path: Path, profiles: int = 1) -> PlanMemory:
    path.write_bytes(b"p" * 100)
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda content: engine if len(content) == 100 else None)
    with path.open("r+b") as file:
        return memory_of(SimpleNamespace(Runtime=lambda _: runtime), None, log, file, flags, profiles=profiles)


def _log(*activations: int, weights: int | None = None) -> BuildLog:
    log = BuildLog()
    for figure in activations:
        log.note("INFO", f"Total Activation Memory: {figure} bytes")
    if weights is not None:
        log.note("INFO", f"Total Weights Memory: {weights} bytes")
    return log


@pytest.mark.parametrize("streaming", [False, True])
def test_memory_is_what_the_builder_logged(streaming: bool, tmp_path: Path) -> None:
    flags = BuildFlags(weight_streaming=streaming)
    # Without a figure for weights, the plan's size is an upper bound.
    for log, weights in ((_log(30), 100), (_log(30, weights=80), 80)):
        streamable = weights if streaming else 0
        expected = PlanMemory(weights=weights, activations=30, streamable=streamable, profile_activations=(30,))
        assert _memory(log, None, flags, tmp_path / "plan") == expected


def test_each_profile_has_the_figure_that_the_builder_logged_for_it(tmp_path: Path) -> None:
    memory = _memory(_log(10, 30, 20, weights=80), None, BuildFlags(), tmp_path / "plan", profiles=3)
    assert memory == PlanMemory(weights=80, activations=30, profile_activations=(10, 30, 20))


ENGINE = SimpleNamespace(
    device_memory_size_v2=31, streamable_weights_size=7, get_device_memory_size_for_profile_v2=lambda i: (11, 31)[i]
)


@pytest.mark.parametrize("logged", [(), (30,), (10, 20, 30)], ids=["none", "fewer", "more"])
def test_the_engine_is_asked_unless_the_log_has_a_figure_for_each_profile(
    logged: tuple[int, ...], tmp_path: Path
) -> None:
    memory = _memory(_log(*logged), ENGINE, BuildFlags(), tmp_path / "plan", profiles=2)
    assert memory == PlanMemory(weights=100, activations=31, streamable=7, profile_activations=(11, 31))


def test_the_largest_logged_figure_counts_for_all_profiles_of_an_engine_that_cannot_be_loaded(tmp_path: Path) -> None:
    memory = _memory(_log(20, 30, 10), None, BuildFlags(), tmp_path / "plan", profiles=2)
    assert memory == PlanMemory(weights=100, activations=30)
    assert [memory.activations_of(index) for index in (0, 1)] == [30, 30]


def test_memory_without_any_figure_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="did not state the memory"):
        _memory(BuildLog(), None, BuildFlags(), tmp_path / "plan")
