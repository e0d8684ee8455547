"""The timing cache: where it is, what is read into a build, and what is written after it."""

import os
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.engines.build.network import BuildLog
from sdxl_trt.engines.build.timing import TimingCache, cache_file
from sdxl_trt.engines.bundle.plan_record import ANY, Environment
from sdxl_trt.engines.errors import UsageError

HERE = Environment(
    flavour="tensorrt", tensorrt="11.4.0.106", gpu="NVIDIA GeForce RTX 4090", compute_capability="8.9", driver="580",
    platform="linux-x86_64",
)  # fmt: skip


class Cache:
    """A cache of named times: its bytes are the names, after the GPU's."""

    def __init__(self, content: bytes) -> None:
        device, *entries = content.decode().split() or ["4090"]
        self.device, self.entries = device, set(entries)

    def combine(self, input_cache: "Cache", ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if self.device == input_cache.device:
            self.entries |= input_cache.entries
        return self.device == input_cache.device

    def serialize(self) -> bytes:
        return " ".join([self.device, *sorted(self.entries)]).encode()


class Config:
    """The part of IBuilderConfig that has to do with timing caches."""

    def __init__(self) -> None:
        self.cache: Cache | None = None

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Cache | None:
        return None if serialized_timing_cache == b"garbage" else Cache(serialized_timing_cache)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        fits = cache.device == "4090"
        self.cache = cache if fits else self.cache
        return fits

    def get_timing_cache(self) -> Cache | None:
        return self.cache


class Log(BuildLog):
    """The build log's lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def note(self, severity: str, message: str) -> None:
        self.lines.append(f"{severity} {message}")


def _build(path: Path, *, shared: bool = True, meanwhile: bytes | None = None, times: str = "new") -> tuple[Any, Log]:
    """Run a build that measures `times`; another one writes `meanwhile` before it ends. Return what it began with."""
    config, log = Config(), Log()
    timing = TimingCache(config, path, log, shared=shared)
    assert config.cache is not None
    before = set(config.cache.entries)
    config.cache.entries.add(times)
    if meanwhile is not None:
        path.write_bytes(meanwhile)
        path.chmod(0o600)
    timing.save()
    return before, log


def _written(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_the_cache_is_one_for_each_gpu_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "sdxl-trt/timing/NVIDIA-GeForce-RTX-4090-8.9-11.4.0.106.cache"
    assert cache_file(HERE) == file
    import msgspec

    others = [msgspec.structs.replace(HERE, **change) for change in (
        {"gpu": "NVIDIA L4"}, {"compute_capability": "9.0"}, {"tensorrt": "11.5.0.1"}, {"driver": "590"},
    )]  # fmt: skip
    assert [cache_file(each) == file for each in others] == [False, False, False, True]
    for field in ("gpu", "tensorrt"):
        hostile = cache_file(msgspec.structs.replace(HERE, **{field: "../../x y/.."}))
        assert hostile is not None
        assert hostile.parent == file.parent


def test_tensorrt_for_rtx_has_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rtx = Environment(flavour="tensorrt-rtx", tensorrt="1.7", gpu=ANY, compute_capability=ANY, driver=ANY, platform="p")
    assert cache_file(rtx) is None


def test_a_user_without_a_home_builds_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("sdxl_trt.engines.build.timing.cache_folder", homeless)
    assert cache_file(HERE) is None


def test_later_builds_start_with_what_earlier_ones_measured(tmp_path: Path) -> None:
    path = tmp_path / "timing" / "gpu.cache"
    first, log = _build(path, times="conv")
    assert (first, path.read_bytes()) == (set(), b"4090 conv")
    assert log.lines == [
        "INFO timing cache: gpu.cache does not exist yet or is empty; starting with an empty one",
        "INFO timing cache: 9 bytes saved to gpu.cache",
    ]
    second, log = _build(path, times="attention")
    assert (second, path.read_bytes()) == ({"conv"}, b"4090 attention conv")
    assert log.lines[0] == "INFO timing cache: 9 bytes read from gpu.cache"


@pytest.mark.parametrize("shared", [True, False])
def test_what_another_build_wrote_meanwhile_is_kept(shared: bool, tmp_path: Path) -> None:
    path = _written(tmp_path / "gpu.cache", b"4090 old")
    _build(path, shared=shared, meanwhile=b"4090 old theirs")
    assert path.read_bytes() == b"4090 new old theirs"


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("content", [b"garbage", b"3060 slow"], ids=["damaged", "another GPU"])
def test_a_cache_that_does_not_fit_is_replaced(content: bytes, shared: bool, tmp_path: Path) -> None:
    path = _written(tmp_path / "gpu.cache", content)
    before, log = _build(path, shared=shared)
    assert (before, path.read_bytes()) == (set(), b"4090 new")
    assert "gpu.cache is damaged, or of another GPU or version; starting with an empty one" in log.lines[0]


@pytest.mark.skipif(os.name != "posix", reason="mode bits")
def test_a_shared_cache_that_others_can_write_is_not_read(tmp_path: Path) -> None:
    path = _written(tmp_path / "gpu.cache", b"4090 theirs", 0o666)
    before, log = _build(path)
    assert (before, path.read_bytes()) == (set(), b"4090 new")
    assert "gpu.cache is not used: other users can write it" in log.lines[0]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.name != "posix", reason="mode bits")
def test_a_file_that_the_user_named_may_be_shared_with_others(tmp_path: Path) -> None:
    path = _written(tmp_path / "gpu.cache", b"4090 theirs", 0o666)
    before, _ = _build(path, shared=False)
    assert before == {"theirs"}


def test_a_shared_cache_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "timing").write_text("not a folder")
    before, log = _build(tmp_path / "timing" / "gpu.cache")
    assert before == set()
    assert log.lines[-1] == "WARNING timing cache: gpu.cache cannot be written; the plan is not affected"


def test_a_named_file_that_cannot_be_read_or_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="reading"):
        _build(tmp_path, shared=False)
    with pytest.raises(UsageError, match="writing"):
        _build(tmp_path / "missing" / "gpu.cache", shared=False)


def test_a_tensorrt_without_timing_caches_is_no_error(tmp_path: Path) -> None:
    config, log = Config(), Log()
    config.get_timing_cache = lambda: None  # type: ignore[method-assign]
    TimingCache(config, tmp_path / "gpu.cache", log).save()
    assert log.lines[-1] == "INFO timing cache: this TensorRT keeps none"


def test_the_log_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    _, log = _build(tmp_path / "gpu.cache")
    assert str(tmp_path) not in " ".join(log.lines)
