"""CUDA's runtime on the simulated device: errors, lifetimes, copies and graph capture."""

import sys
import threading

import numpy as np
import pytest

from sdxl_trt.engines.backends.cuda import runtime as cuda_module
from sdxl_trt.engines.backends.cuda.memory import DeviceBuffer, PinnedBuffer
from sdxl_trt.engines.backends.cuda.runtime import Cuda, cuda_runtime
from sdxl_trt.engines.backends.cuda.streams import Stream
from sdxl_trt.engines.errors import EngineError, IncompatibleError, ResourceError


def test_the_names_of_errors_exist_in_cuda() -> None:
    names = set(cuda_runtime().cudaError_t.__members__)
    assert {*cuda_module._STICKY, *cuda_module._NO_DEVICE, cuda_module._OUT_OF_MEMORY} <= names


def test_missing_bindings_name_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(IncompatibleError, match=r"needs cuda-bindings .*; pip install 'sdxl-trt\[tensorrt\]'"):
        Cuda()


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("cudaErrorMemoryAllocation", ResourceError, "doing: out of memory; try --residency"),
        ("cudaErrorInsufficientDriver", IncompatibleError, "driver version is insufficient.*install the NVIDIA driver"),
        ("cudaErrorNoDevice", IncompatibleError, "no CUDA-capable device.*CUDA_VISIBLE_DEVICES"),
        ("cudaErrorIllegalAddress", EngineError, "this process can no longer use the GPU"),
        ("cudaErrorLaunchFailure", EngineError, "this process can no longer use the GPU"),
        ("cudaErrorInvalidValue", EngineError, "doing: CUDA failed: cudaErrorInvalidValue"),
    ],
)
def test_an_error_becomes_one_of_ours(simulated, name: str, kind: type, text: str) -> None:
    cuda = Cuda()
    error = cuda.explain(getattr(cuda.runtime.cudaError_t, name), "doing")
    assert type(error) is kind
    with pytest.raises(kind, match=text):
        raise error
    assert "\n" not in str(error)


def test_calls_return_what_cuda_returns(simulated) -> None:
    cuda = Cuda()
    assert cuda.call("cudaSetDevice", 0, doing="x") is None
    assert cuda.call("cudaGetDeviceCount", doing="x") == 1
    assert cuda.memory() == (simulated.memory_limit, simulated.memory_limit)


def test_every_thread_sets_its_device_once(simulated) -> None:
    cuda = Cuda()
    for _ in range(3):
        cuda.memory()
    assert simulated.calls["cudaSetDevice"] == 1
    thread = threading.Thread(target=cuda.memory)
    thread.start()
    thread.join()
    assert simulated.calls["cudaSetDevice"] == 2


def test_memory_is_freed_once_and_counted(simulated) -> None:
    cuda = Cuda()
    first, second = DeviceBuffer(cuda, 1024, "x"), DeviceBuffer(cuda, 512, "x")
    pinned = PinnedBuffer(cuda, 256, "x")
    assert first.address % 256 == 0
    assert (cuda.usage.device, cuda.usage.pinned) == (1536, 256)
    assert [first.free(), first.free()] == [True, False]
    assert [pinned.free(), pinned.free()] == [True, False]
    assert (cuda.usage.device, cuda.usage.device_peak, cuda.usage.pinned, cuda.usage.pinned_peak) == (512, 1536, 0, 256)
    assert simulated.calls["cudaFree"] == simulated.calls["cudaFreeHost"] == 1
    with pytest.raises(EngineError, match="DeviceBuffer was used after it was freed"):
        _ = first.address
    with pytest.raises(EngineError, match="PinnedBuffer was used after it was freed"):
        pinned.view(0, (4,), np.float32)
    second.free()


def test_a_failed_allocation_is_a_resource_error(simulated) -> None:
    cuda = Cuda()
    simulated.fail_allocation()
    with pytest.raises(ResourceError, match="allocating the block: out of memory"):
        DeviceBuffer(cuda, 1024, "allocating the block")
    assert cuda.usage.device == 0
    DeviceBuffer(cuda, 1024, "allocating the block").free()


@pytest.mark.parametrize("shape", [(65,), (0, 3), (4, 4)])
def test_a_view_covers_its_own_bytes(simulated, shape: tuple[int, ...]) -> None:
    pinned = PinnedBuffer(Cuda(), 512, "x")
    view = pinned.view(64, shape, np.float16)
    assert (view.shape, view.dtype, view.flags.writeable) == (shape, np.float16, True)
    assert view.ctypes.data == pinned.address + 64
    view[...] = 1
    pinned.free()


@pytest.mark.parametrize(("offset", "shape"), [(0, (257,)), (512, (1,)), (-2, (1,)), (256, (129,))])
def test_a_view_past_the_end_is_refused(simulated, offset: int, shape: tuple[int, ...]) -> None:
    pinned = PinnedBuffer(Cuda(), 512, "x")
    with pytest.raises(EngineError, match="of a buffer of 512"):
        pinned.view(offset, shape, np.float16)
    pinned.free()


def test_copies_arrive_after_synchronize(simulated, rng) -> None:
    cuda = Cuda()
    stream, block, pinned = Stream(cuda), DeviceBuffer(cuda, 256, "x"), PinnedBuffer(cuda, 512, "x")
    there, back = pinned.view(0, (32,), np.float32), pinned.view(256, (32,), np.float32)
    values = rng.standard_normal(32).astype(np.float32)
    there[:] = values
    stream.upload(block.address, there, "x")
    stream.download(back, block.address, "x")
    assert not np.array_equal(back, values)  # not synchronized yet
    stream.synchronize("x")
    np.testing.assert_array_equal(back, values)
    assert simulated.since() == {"HostToDevice": 128, "DeviceToHost": 128}
    for each in (stream, block, pinned):
        each.free()


def test_a_lost_device_raises_and_can_still_be_freed(simulated) -> None:
    cuda = Cuda()
    stream, block, pinned = Stream(cuda), DeviceBuffer(cuda, 256, "x"), PinnedBuffer(cuda, 256, "x")
    simulated.sticky_after(0)
    with pytest.raises(EngineError, match=r"waiting: cudaErrorIllegalAddress .*end it, and start again"):
        stream.synchronize("waiting")
    with pytest.raises(EngineError, match="allocating: cudaErrorIllegalAddress"):
        DeviceBuffer(cuda, 256, "allocating")
    assert isinstance(stream.drain("x"), EngineError)
    for each in (block, pinned, stream):
        assert each.free()
        assert not each.free()


@pytest.fixture
def captured(simulated):
    """Return the device, a stream, a function that enqueues a copy of 256 bytes there and back, and both arrays."""
    cuda = Cuda()
    stream, pinned = Stream(cuda), PinnedBuffer(cuda, 512, "x")
    block = DeviceBuffer(cuda, 256, "x")
    view, back = pinned.view(0, (64,), np.float32), pinned.view(256, (64,), np.float32)
    view[:] = 3

    def copy() -> None:
        stream.upload(block.address, view, "x")
        stream.download(back, block.address, "x")

    yield simulated, stream, copy, view, back
    for each in (block, pinned, stream):
        each.free()


def test_a_captured_sequence_runs_when_it_is_launched(captured) -> None:
    device, stream, copy, view, back = captured
    graph = stream.capture(copy, "capturing")
    stream.synchronize("x")
    assert device.transfers == []
    for value in (3, 5):
        view[:] = value
        stream.launch(graph, "x")
        stream.synchronize("x")
        np.testing.assert_array_equal(back, value)
    graph.free()
    graph.free()
    with pytest.raises(EngineError, match="Graph was used after it was freed"):
        stream.launch(graph, "x")


def test_other_threads_may_allocate_during_a_capture(captured) -> None:
    """A thread loads the refiner while the base's step is captured."""
    _, stream, copy, *_ = captured
    allocated: list[DeviceBuffer] = []

    def record() -> None:
        copy()
        thread = threading.Thread(target=lambda: allocated.append(DeviceBuffer(Cuda(), 256, "x")))
        thread.start()
        thread.join()

    stream.capture(record, "capturing").free()
    allocated.pop().free()


def test_a_failed_capture_leaves_the_stream_usable(captured) -> None:
    """The recording raises, CUDA invalidates it, or it cannot begin."""
    device, stream, copy, _, back = captured

    def fail() -> None:
        copy()
        raise KeyboardInterrupt

    def allocate() -> None:
        DeviceBuffer(Cuda(), 256, "allocating")

    with pytest.raises(KeyboardInterrupt):
        stream.capture(fail, "capturing")
    with pytest.raises(EngineError, match="allocating: CUDA failed: cudaErrorStreamCaptureUnsupported"):
        stream.capture(allocate, "capturing")
    device.fail_capture()
    with pytest.raises(EngineError, match="capturing: CUDA failed: cudaErrorStreamCaptureUnsupported"):
        stream.capture(copy, "capturing")
    copy()
    stream.synchronize("x")
    np.testing.assert_array_equal(back, 3)
