"""A plan is handed out only if every chunk has its digest, checked in the memory that is handed out."""

import hashlib
import io
import mmap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.bundle.bundle import MANIFEST, Bundle
from sdxl_trt.engines.bundle.plan_record import BuildFlags, Chunks, Environment, PlanKey, PlanMemory, PlanRecord
from sdxl_trt.engines.bundle.records import FileRecord
from sdxl_trt.engines.errors import CorruptError, ResourceError, SdxlTrtError, UsageError
from sdxl_trt.engines.plans import reading
from sdxl_trt.engines.plans.files import start_reading
from sdxl_trt.engines.plans.reading import PlanReader, reading_threads

PAGE = mmap.PAGESIZE
CONTENT = bytes(range(251)) * 100
SHA256 = "0" * 64
WAIT = 20


def digests(content: bytes, chunk: int) -> tuple[str, ...]:
    return tuple(hashlib.sha256(content[at : at + chunk]).hexdigest() for at in range(0, len(content), chunk))


def reader_of(path: Any, content: bytes = CONTENT, chunk: int = PAGE, threads: int | None = 2) -> PlanReader:
    return PlanReader(path, len(content), chunk, digests(content, chunk), CorruptError, threads)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "a.plan").write_bytes(CONTENT)
    return tmp_path / "a.plan"


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


class Memory:
    """A path to bytes in memory; `before(offset)` is called before every read."""

    def __init__(self, content: bytes, before: Callable[[int], None] = lambda _: None) -> None:
        self.content, self.before, self.name, self.reads = content, before, "a.plan", 0
        self.size = len(content)

    def stat(self) -> Any:
        return type("Status", (), {"st_size": self.size})

    def open(self, mode: str, buffering: int) -> Any:
        assert (mode, buffering) == ("rb", 0)
        outer = self

        class File(io.BytesIO):
            def readinto(self, buffer: Any) -> int:
                outer.before(self.tell())
                outer.reads += 1
                return super().readinto(buffer)

        return File(self.content)


@given(
    content=st.binary(min_size=1, max_size=200),
    chunk=st.integers(1, 220),
    threads=st.integers(1, 4),
    flip=st.none() | st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_any_changed_byte_is_refused_and_its_chunk_named(
    content: bytes, chunk: int, threads: int, flip: int | None
) -> None:
    found = bytearray(content)
    if flip is not None:
        found[flip % len(found)] ^= 1 << flip % 8
    reader = PlanReader(Memory(bytes(found)), len(content), chunk, digests(content, chunk), CorruptError, threads)  # type: ignore[arg-type]
    try:
        if flip is None:
            assert reader.whole() == content
            assert reader.complete
            return
        with pytest.raises(CorruptError) as caught:
            reader.whole()
        start = flip % len(found) // chunk * chunk
        if len(content) > chunk:
            assert f"the sha256 of its bytes {start} to {min(start + chunk, len(content)) - 1} is not" in str(
                caught.value
            )
        with pytest.raises(CorruptError):
            reader.at(flip % len(found))
    finally:
        reader.close()


@pytest.mark.parametrize("size", [len(CONTENT) - 1, len(CONTENT) + 1, 0])
def test_a_file_of_another_size_is_refused_before_it_is_read(path: Path, size: int) -> None:
    path.write_bytes((CONTENT * 2)[:size])
    with pytest.raises(CorruptError, match=f"{size} bytes, but the manifest says {len(CONTENT)}"):
        reader_of(path)


def test_a_file_that_becomes_shorter_is_refused() -> None:
    file = Memory(CONTENT)
    file.content = CONTENT[: 2 * PAGE + 1]  # after its size was asked for
    reader = reader_of(file)
    with pytest.raises(CorruptError, match="it became shorter while it was read"):
        reader.wait()
    reader.close()


def test_what_was_handed_out_does_not_change_with_the_file(path: Path) -> None:
    reader = reader_of(path)
    whole = reader.whole()
    path.write_bytes(bytes(len(CONTENT)))
    assert whole == CONTENT
    with pytest.raises(TypeError):
        whole[0] = 1
    reader.close()
    assert whole == CONTENT, "the view owns the memory"


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="the system cannot take memory back")
def test_a_dropped_chunk_is_read_and_checked_again(path: Path) -> None:
    reader = reader_of(path)
    reader.wait()
    reader.drop(2 * PAGE + 1)
    assert not reader.complete
    assert reader.at(2 * PAGE) == CONTENT[2 * PAGE : 3 * PAGE], "it ends above"
    assert reader.at(PAGE + 5) == CONTENT[PAGE + 5 : 2 * PAGE]
    assert reader.whole() == CONTENT
    reader.drop(PAGE)
    path.write_bytes(b"x" + CONTENT[1:])
    with pytest.raises(CorruptError, match=f"bytes 0 to {PAGE - 1}"):
        reader.at(0)
    reader.close()


def test_memory_may_be_used_again(path: Path) -> None:
    memory = mmap.mmap(-1, len(CONTENT) + 1)
    for content in (CONTENT, CONTENT[::-1]):
        path.write_bytes(content)
        reader = PlanReader(path, len(content), PAGE, digests(content, PAGE), CorruptError, 2, memory)
        assert reader.whole() == content == memory[: len(content)]
        reader.close()


def test_chunks_are_handed_out_before_the_last_one_is_read() -> None:
    last, go = len(CONTENT) // PAGE, threading.Event()

    def wait(offset: int) -> None:
        if offset >= last * PAGE:
            assert go.wait(WAIT)

    reader = reader_of(Memory(CONTENT, wait))
    assert reader.at(0) == CONTENT[:PAGE]
    assert not reader.complete
    go.set()
    reader.wait()
    assert reader.complete
    reader.close()


def test_closing_ends_the_threads_after_the_block_that_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK", 64)
    began, go = threading.Event(), threading.Event()

    def wait(_: int) -> None:
        began.set()
        assert go.wait(WAIT)

    file = Memory(CONTENT, wait)
    reader = reader_of(file)
    waiting: list[BaseException | None] = []
    other = threading.Thread(target=lambda: waiting.append(_raised(reader.whole)))
    other.start()
    assert began.wait(WAIT)
    closing = threading.Thread(target=reader.close)
    closing.start()
    other.join(WAIT)  # who waits is told at once
    go.set()
    closing.join(WAIT)
    assert file.reads <= 2, "one block for each thread"
    assert isinstance(waiting[0], SdxlTrtError)
    reader.wait()
    reader.close()


def _raised(call: Callable[[], Any]) -> BaseException | None:
    try:
        call()
    except SdxlTrtError as exc:
        return exc
    return None


def test_every_caller_gets_an_error_of_its_own(path: Path) -> None:
    path.write_bytes(CONTENT[:-1] + b"?")
    reader = reader_of(path)
    first, second = _raised(reader.wait), _raised(reader.wait)
    assert isinstance(first, CorruptError)
    assert first is not second
    reader.close()


def test_an_unexpected_error_of_a_thread_is_raised_too() -> None:
    def fail(_: int) -> None:
        raise ValueError("odd")

    reader = reader_of(Memory(CONTENT, fail))
    with pytest.raises(SdxlTrtError, match=r"reading .*: odd"):
        reader.whole()
    reader.close()


def test_memory_that_the_system_refuses_is_a_resource_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(reading.mmap, "mmap", refuse)
    with pytest.raises(ResourceError, match="out of host memory"):
        reader_of(path)


def test_chunks_are_read_by_several_threads_each_once() -> None:
    both, names = threading.Barrier(2), set()

    def meet(offset: int) -> None:
        if offset in (0, PAGE):
            names.add(threading.current_thread().name)
            both.wait(WAIT)  # breaks unless two threads are here at once

    file = Memory(CONTENT, meet)
    reader = reader_of(file)
    assert reader.whole() == CONTENT
    reader.close()
    assert len(names) == 2
    assert file.reads == -(-len(CONTENT) // PAGE)
    assert 1 <= reading_threads() <= 4


@pytest.fixture
def recorded(path: Path) -> Callable[..., tuple[Bundle, PlanRecord]]:
    """Return a function that returns a bundle, and the record of the file as its plan."""
    (path.parent / MANIFEST).write_bytes(b"{}")
    for place in (path.parent, path.parent / MANIFEST, path):
        place.chmod(0o755)
    nowhere = Environment(
        flavour="tensorrt", tensorrt="11", gpu="any", compute_capability="any", driver="any", platform="any"
    )
    key = PlanKey(component="unet", graph=SHA256, weights=SHA256, environment=nowhere, profiles=(), flags=BuildFlags())
    file = FileRecord(file=path.name, size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())

    def make(chunks: Chunks | None = None) -> tuple[Bundle, PlanRecord]:
        memory = PlanMemory(weights=1, activations=1)
        return Bundle(path.parent, None), PlanRecord(key=key, file=file, memory=memory, seconds=1.0, chunks=chunks)  # type: ignore[arg-type]

    return make


def test_a_record_without_chunks_is_checked_whole(path: Path, recorded: Any) -> None:
    bundle, record = recorded()
    assert start_reading(bundle, record).whole() == CONTENT
    path.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(CorruptError, match=r"a\.plan: its sha256 is not the manifest's; the plan is damaged: build it"):
        start_reading(bundle, record).whole()


def test_the_digests_of_chunks_decide(path: Path, recorded: Any) -> None:
    bundle, record = recorded(Chunks(size=PAGE, sha256=digests(CONTENT, PAGE)))
    assert start_reading(bundle, record).whole() == CONTENT
    bundle, record = recorded(Chunks(size=PAGE, sha256=(SHA256, *digests(CONTENT, PAGE)[1:])))
    with pytest.raises(CorruptError, match=rf"a\.plan: the sha256 of its bytes 0 to {PAGE - 1} is not the manifest's"):
        start_reading(bundle, record).whole()
    with pytest.raises(CorruptError, match="1 digests do not cover"):
        start_reading(*recorded(Chunks(size=PAGE, sha256=(SHA256,))))
    path.unlink()
    with pytest.raises(UsageError, match="check the path"):
        start_reading(*recorded()).whole()


def test_a_plan_that_others_can_write_is_refused(path: Path, recorded: Any) -> None:
    path.chmod(0o664)
    with pytest.raises(CorruptError, match="other users can write it"):
        start_reading(*recorded())
