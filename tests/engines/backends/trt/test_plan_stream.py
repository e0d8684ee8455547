"""A plan is deserialized from checked chunks as they arrive, or whole; a damaged byte never reaches TensorRT."""

import hashlib
import logging
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdxl_trt.engines.backends.trt import plan_stream
from sdxl_trt.engines.backends.trt.device import TrtDevice, open_device
from sdxl_trt.engines.backends.trt.engine import TrtEngine
from sdxl_trt.engines.backends.trt.plan_stream import PIECE, deserialize, make_reader
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.errors import CorruptError, EngineError, ResourceError
from sdxl_trt.engines.plans.files import start_reading
from sdxl_trt.engines.plans.reading import PlanReader
from sdxl_trt.mini.embedded import bundle_path

PAGE = mmap.PAGESIZE
CONTENT = bytes(range(253)) * 100


class Base:
    """IStreamReaderV2, as far as it has a constructor."""


TRT = SimpleNamespace(IStreamReaderV2=Base)
SET, CUR, END = (SimpleNamespace(name=name) for name in ("SET", "CUR", "END"))


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Callable[..., PlanReader]]:
    made = []

    def make(content: bytes = CONTENT, chunk: int = PAGE) -> PlanReader:
        path = tmp_path / "a.plan"
        path.write_bytes(content)
        digests = [hashlib.sha256(CONTENT[at : at + chunk]).hexdigest() for at in range(0, len(CONTENT), chunk)]
        made.append(PlanReader(path, len(CONTENT), chunk, tuple(digests), CorruptError))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def arriving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every plan count as one that is still being read."""
    monkeypatch.setattr(PlanReader, "complete", False)


def copied(stream: Any, size: int) -> bytes:
    """Read `size` bytes as NVIDIA's binding does: it calls again until it has them, and keeps no buffer."""
    content = b""
    while len(content) < size:
        piece = stream.read(size - len(content), 0)
        if not len(piece):
            break
        content += bytes(piece)
    return content


class Runtime:
    """A runtime that reads a stream as `way` says; `failures` calls fail."""

    def __init__(self, way: Callable[[Any], bytes], failures: int = 0) -> None:
        self.way, self.failures, self.given = way, failures, []

    def deserialize_cuda_engine(self, plan: Any) -> bytes | None:
        streamed = isinstance(plan, Base)
        self.given.append("stream" if streamed else "buffer")
        content = self.way(plan) if streamed else bytes(plan)
        self.failures -= 1
        return content if self.failures < 0 and content == CONTENT else None


def ask(method: Callable[..., Any], *arguments: Any) -> Any:
    result = method(*arguments)
    if result is None:
        raise EngineError("TensorRT failed")
    return result


def whole(stream: Any) -> bytes:
    return copied(stream, len(CONTENT))


def backwards(stream: Any) -> bytes:
    """Read the end first, then all, then the start again: the chunks there have been dropped."""
    assert stream.seek(-5, END)
    assert copied(stream, 5) == CONTENT[-5:]
    assert copied(stream, 1) == b"", "the end"
    assert stream.seek(0, SET)
    head = copied(stream, 2 * PAGE)
    assert stream.seek(-PAGE, CUR)
    assert head + copied(stream, len(CONTENT)) == CONTENT[: 2 * PAGE] + CONTENT[PAGE:]
    assert not stream.seek(1, END)
    assert not stream.seek(-1, SET)
    assert stream.seek(0, SET)
    return whole(stream)


@pytest.mark.usefixtures("arriving")
@pytest.mark.parametrize("way", [whole, backwards])
def test_a_plan_that_is_arriving_is_streamed(reader: Any, way: Any) -> None:
    runtime = Runtime(way)
    assert deserialize(TRT, runtime, reader(), ask) == CONTENT
    assert runtime.given == ["stream"]


def test_a_plan_that_is_there_is_given_whole(reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, plan = Runtime(whole), reader()
    plan.wait()
    assert deserialize(TRT, runtime, plan, ask) == CONTENT
    monkeypatch.setattr(PlanReader, "complete", False)
    assert deserialize(SimpleNamespace(), runtime, reader(), ask) == CONTENT, "a version without the class"
    assert deserialize(TRT, runtime, reader(chunk=len(CONTENT)), ask) == CONTENT, "one chunk"
    assert deserialize(TRT, runtime, memoryview(CONTENT), ask) == CONTENT
    assert runtime.given == ["buffer"] * 4


@pytest.mark.usefixtures("arriving")
@pytest.mark.parametrize("place", [0, PAGE, len(CONTENT) - 1])
def test_a_damaged_chunk_ends_the_stream_before_it_is_handed_out(reader: Any, place: int) -> None:
    damaged = bytearray(CONTENT)
    damaged[place] ^= 1
    got: list[bytes] = []
    runtime = Runtime(lambda stream: got.append(whole(stream)) or got[0])
    with pytest.raises(CorruptError):
        deserialize(TRT, runtime, reader(bytes(damaged)), ask)
    assert CONTENT.startswith(got[0])
    assert len(got[0]) <= place
    assert runtime.given == ["stream"], "it is not tried again"


@pytest.mark.usefixtures("arriving")
def test_an_interrupt_while_a_piece_is_read_is_not_lost(reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    at, calls = PlanReader.at, []

    def interrupted(plan: PlanReader, offset: int) -> memoryview:
        calls.append(offset)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return at(plan, offset)

    monkeypatch.setattr(PlanReader, "at", interrupted)
    runtime = Runtime(whole)
    with pytest.raises(KeyboardInterrupt):
        deserialize(TRT, runtime, reader(), ask)
    assert runtime.given == ["stream"]


@pytest.mark.usefixtures("arriving")
def test_a_refused_stream_is_tried_again_from_memory(reader: Any, caplog: pytest.LogCaptureFixture) -> None:
    runtime = Runtime(lambda stream: bytes(stream.read(10, 0)))
    with caplog.at_level(logging.WARNING):
        assert deserialize(TRT, runtime, reader(), ask) == CONTENT
    assert runtime.given == ["stream", "buffer"]
    assert caplog.messages == ["the plan is read whole: TensorRT did not take it in pieces (TensorRT failed)"]
    with pytest.raises(EngineError):
        deserialize(TRT, Runtime(whole, failures=2), reader(), ask)


@pytest.mark.usefixtures("arriving")
def test_without_a_cuda_driver_there_is_no_stream(reader: Any, caplog: pytest.LogCaptureFixture) -> None:
    class NoDriver:
        def __init__(self) -> None:
            raise RuntimeError("Failed to open cuda driver.")

    runtime = Runtime(whole)
    assert deserialize(SimpleNamespace(IStreamReaderV2=NoDriver), runtime, reader(), ask) == CONTENT
    assert runtime.given == ["buffer"]
    assert "Failed to open cuda driver" in caplog.text


@pytest.mark.usefixtures("arriving")
def test_out_of_device_memory_is_not_tried_again(reader: Any) -> None:
    def full(*_: Any) -> None:
        raise ResourceError("out of memory")

    with pytest.raises(ResourceError) as caught:
        deserialize(TRT, Runtime(whole), reader(), full)
    assert caught.value.__cause__ is None, "a chain of causes ends"


def test_a_piece_is_small_and_what_was_copied_is_dropped(reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_stream, "PIECE", 100)
    plan = reader()
    plan.wait()
    stream = make_reader(TRT, plan)
    assert [len(stream.read(1 << 30, 0)) for _ in range(3)] == [100] * 3
    assert stream.seek(2 * PAGE, SET)
    stream.read(1, 0)
    assert not plan.complete
    assert plan.at(0) == CONTENT[:PAGE]
    assert PIECE <= 4 << 20


@pytest.fixture
def bundle(simulated: Any, tmp_path: Path) -> Bundle:
    sizes: dict[str, Any] = {"height": 64, "width": 64, "batch": (1, 1, 2), "tokens": 77}
    return read_bundle(simulated.bundle(bundle_path(), tmp_path / "bundle", chunk=200, weight_streaming=True, **sizes))


@pytest.fixture
def device(simulated: Any) -> Iterator[TrtDevice]:
    with open_device("tensorrt") as device:
        yield device


@pytest.mark.usefixtures("arriving")
@pytest.mark.parametrize("budget", [None, 0])
def test_the_simulated_runtime_takes_a_stream(simulated: Any, bundle: Bundle, device: Any, budget: int | None) -> None:
    """It reads the head, goes back to the start, and reads all of it, with the binding's own signature."""
    for record in bundle.manifest.plans:
        assert record.chunks is not None
        assert len(record.chunks.sha256) > 1
        engine = TrtEngine(bundle, record, device, weight_budget=budget)
        engine.load()
        assert engine._plan is None
        engine.unload()
    assert simulated.deserialized == [record.file.sha256 for record in bundle.manifest.plans]


@pytest.mark.usefixtures("arriving")
def test_a_damaged_plan_is_refused_while_it_is_streamed(simulated: Any, bundle: Bundle, device: Any) -> None:
    (record,) = [record for record in bundle.manifest.plans if record.key.component == "unet"]
    path = bundle.path(record.file)
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=r"unet.*\.plan: the sha256 of its bytes 400 to 599 is not the manifest's"):
        TrtEngine(bundle, record, device).load()
    with pytest.raises(CorruptError, match="bytes 400 to 599"):
        start_reading(bundle, record).whole()
    assert simulated.deserialized == []


def test_unloading_ends_a_prefetch_in_another_thread(bundle: Bundle, device: Any) -> None:
    engine = TrtEngine(bundle, bundle.manifest.plans[0], device)
    plan = engine._started()
    engine.unload()
    assert plan is not None
    plan.wait()
    assert engine._plan is None
    engine.load()
    engine.prefetch()
    assert engine._plan is None, "nothing is read for a loaded engine"
    engine.unload()
