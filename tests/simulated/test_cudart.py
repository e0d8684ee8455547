"""The simulated memory, streams and graphs: mistakes that show on real hardware only by chance always raise here."""

import ctypes
import inspect
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def cuda(simulated: Any) -> Any:
    from cuda.bindings import runtime

    return runtime


@pytest.fixture(autouse=True)
def _lenient(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests leave broken state on purpose."""
    simulated.leaks_matter = False


def _view(pointer: int, size: int) -> Any:
    return np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(pointer))


def _good(result: tuple[Any, ...]) -> Any:
    assert result[0].name == "cudaSuccess", result
    return result[1] if len(result) == 2 else result[1:]


class Memory:
    """A stream, pinned and device memory of 512 bytes each, and copies between them."""

    def __init__(self, cuda: Any) -> None:
        self.cuda, self.kinds = cuda, cuda.cudaMemcpyKind
        self.stream = _good(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
        self.host, self.device = _good(cuda.cudaMallocHost(512)), _good(cuda.cudaMalloc(512))
        self.view = _view(self.host, 512)

    def up(self, size: int = 512, offset: int = 0) -> None:
        up = self.kinds.cudaMemcpyHostToDevice
        _good(self.cuda.cudaMemcpyAsync(self.device + offset, self.host, size, up, self.stream))

    def down(self, stream: Any = None) -> None:
        down = self.kinds.cudaMemcpyDeviceToHost
        _good(self.cuda.cudaMemcpyAsync(self.host, self.device, 512, down, stream or self.stream))

    def wait(self) -> None:
        _good(self.cuda.cudaStreamSynchronize(self.stream))


@pytest.fixture
def memory(cuda: Any) -> Memory:
    return Memory(cuda)


def test_copied_bytes_come_back_and_are_counted(simulated: Any, cuda: Any, memory: Memory) -> None:
    memory.view[:] = np.arange(512) % 251
    memory.up()
    _good(cuda.cudaMemsetAsync(memory.device, 7, 16, memory.stream))
    memory.wait()
    memory.view[:] = 0
    memory.down()
    memory.wait()
    assert memory.view[:17].tolist() == [7] * 16 + [16]
    assert simulated.since() == {"HostToDevice": 512, "DeviceToHost": 512}
    assert simulated.since() == {}
    assert simulated.transfers == [("HostToDevice", 512), ("DeviceToHost", 512)]


def test_a_result_appears_only_after_the_host_waits(memory: Memory) -> None:
    memory.view[:] = 1
    memory.up()
    memory.wait()
    memory.down()
    assert (memory.view == 0xFF).all()
    memory.wait()
    assert (memory.view == 1).all()


def test_a_source_must_not_change_while_a_copy_needs_it(simulated: Any, memory: Memory) -> None:
    memory.view[:] = 1
    memory.up()
    memory.view[3] = 2
    with simulated.violation("while the copy that reads it was still queued"):
        memory.wait()


def test_a_source_that_queued_work_writes_is_read_in_stream_order(cuda: Any, memory: Memory) -> None:
    memory.view[:] = 5
    memory.up()
    memory.wait()
    other = _good(cuda.cudaMalloc(512))
    memory.down()
    up = memory.kinds.cudaMemcpyHostToDevice
    _good(cuda.cudaMemcpyAsync(other, memory.host, 512, up, memory.stream))
    memory.wait()
    _good(cuda.cudaMemcpy(memory.host, other, 512, memory.kinds.cudaMemcpyDeviceToHost))
    assert (memory.view == 5).all()


def test_memory_that_was_never_written_is_not_zero(memory: Memory) -> None:
    memory.view[:] = 0
    memory.down()
    memory.wait()
    assert np.isnan(memory.view.view(np.float32)).all()


@pytest.mark.parametrize(
    ("size", "offset", "message"),
    [(513, 0, "overrun"), (512, 1, "overrun"), (16, 512, "neither device nor pinned"), (16, -1, "neither device")],
)
def test_copies_stay_within_their_allocations(
    simulated: Any, memory: Memory, size: int, offset: int, message: str
) -> None:
    with simulated.violation(message):
        memory.up(size, offset)


def test_pageable_memory_and_wrong_kinds_are_refused(simulated: Any, cuda: Any, memory: Memory) -> None:
    pageable = np.zeros(512, np.uint8)
    up, down = memory.kinds.cudaMemcpyHostToDevice, memory.kinds.cudaMemcpyDeviceToHost
    with simulated.violation("pageable"):
        cuda.cudaMemcpyAsync(memory.device, pageable, 512, up, memory.stream)
    with simulated.violation("cudaMemcpyDeviceToHost from pinned"):
        cuda.cudaMemcpyAsync(memory.device, memory.host, 512, down, memory.stream)
    with pytest.raises(TypeError, match="kind"):
        cuda.cudaMemcpyAsync(memory.device, memory.host, 512, 1, memory.stream)


def test_use_after_free_is_detected_at_the_call_and_in_the_queue(simulated: Any, cuda: Any, memory: Memory) -> None:
    _good(cuda.cudaFreeAsync(memory.device, memory.stream))
    with simulated.violation("was freed before"):
        memory.up()
    memory.wait()
    with simulated.violation("was freed before"):
        memory.up()
    with simulated.violation("freed twice"):
        cuda.cudaFree(memory.device)


def test_freeing_a_wrong_pointer_is_refused(simulated: Any, cuda: Any, memory: Memory) -> None:
    for free, pointer in ((cuda.cudaFree, memory.device + 256), (cuda.cudaFree, memory.host)):
        with simulated.violation("no such allocation"):
            free(pointer)
    with simulated.violation("no such allocation"):
        cuda.cudaFreeHost(memory.device)
    assert _good(cuda.cudaFree(0)) == ()


def test_a_free_waits_for_the_device(cuda: Any, memory: Memory) -> None:
    memory.view[:] = 9
    memory.up()
    memory.wait()
    memory.down()
    assert (memory.view != 9).all()
    _good(cuda.cudaFree(memory.device))
    assert (memory.view == 9).all()


def test_the_host_must_not_write_past_pinned_memory_or_after_its_free(simulated: Any, cuda: Any) -> None:
    pointer = _good(cuda.cudaMallocHost(100))
    view = _view(pointer, 101)
    kept = view[100]
    view[100] = 0
    with simulated.violation("past its end"):
        cuda.cudaFreeHost(pointer)
    view[100] = kept
    _good(cuda.cudaFreeHost(pointer))
    view[0] = 1
    with simulated.violation("after it had been freed"):
        simulated.check_no_leaks()


def test_streams_that_share_memory_must_be_ordered(simulated: Any, cuda: Any, memory: Memory) -> None:
    other = _good(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
    memory.up()
    with simulated.violation("races with work"):
        memory.down(other)
    event = _good(cuda.cudaEventCreateWithFlags(cuda.cudaEventDisableTiming))
    _good(cuda.cudaEventRecord(event, memory.stream))
    _good(cuda.cudaStreamWaitEvent(other, event, 0))
    memory.view[:] = memory.view  # the host may read memory that work only reads
    memory.down(other)
    _good(cuda.cudaStreamSynchronize(other))
    with simulated.violation("races with work"):
        memory.down(other)
        memory.up()


def test_work_that_the_host_waited_for_is_ordered(cuda: Any, memory: Memory) -> None:
    other = _good(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
    memory.up()
    memory.wait()
    memory.down(other)
    event = _good(cuda.cudaEventCreate())
    _good(cuda.cudaEventRecord(event, other))
    assert cuda.cudaEventQuery(event)[0].name == "cudaErrorNotReady"
    _good(cuda.cudaEventSynchronize(event))
    assert cuda.cudaEventQuery(event)[0].name == "cudaSuccess"
    memory.up()
    memory.wait()


def test_the_default_stream_waits_for_blocking_streams_only(simulated: Any, cuda: Any, memory: Memory) -> None:
    blocking = _good(cuda.cudaStreamCreate())
    memory.down(blocking)
    down = memory.kinds.cudaMemcpyDeviceToHost
    _good(cuda.cudaMemcpy(memory.host, memory.device, 512, down))
    memory.down()
    with simulated.violation("races with work"):
        cuda.cudaMemcpy(memory.host, memory.device, 512, down)


def test_blocking_streams_wait_for_the_default_one(simulated: Any, cuda: Any, memory: Memory) -> None:
    blocking, down = _good(cuda.cudaStreamCreate()), memory.kinds.cudaMemcpyDeviceToHost
    _good(cuda.cudaMemsetAsync(memory.device, 3, 512, 0))
    memory.down(blocking)
    _good(cuda.cudaStreamSynchronize(blocking))
    assert (memory.view == 3).all()
    _good(cuda.cudaMemsetAsync(memory.device, 4, 512, 0))
    with simulated.violation("races with work"):
        cuda.cudaMemcpyAsync(memory.host, memory.device, 512, down, memory.stream)


def test_disjoint_parts_of_an_allocation_do_not_race(cuda: Any, memory: Memory) -> None:
    other = _good(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
    _good(cuda.cudaMemsetAsync(memory.device, 1, 256, memory.stream))
    _good(cuda.cudaMemsetAsync(memory.device + 256, 2, 256, other))


def test_out_of_memory_by_limit_and_on_demand(simulated: Any, cuda: Any) -> None:
    simulated.memory_limit = 1000
    first = _good(cuda.cudaMalloc(600))
    error, pointer = cuda.cudaMalloc(401)
    assert (error.name, pointer) == ("cudaErrorMemoryAllocation", None)
    assert _good(cuda.cudaMemGetInfo()) == (400, 1000)
    _good(cuda.cudaFree(first))
    simulated.fail_allocation(2)
    second = _good(cuda.cudaMalloc(1))
    assert cuda.cudaMalloc(1)[0].name == "cudaErrorMemoryAllocation"
    _good(cuda.cudaMalloc(1))
    assert (simulated.current_bytes, simulated.peak_bytes, second % 256) == (2, 600, 0)
    assert cuda.cudaGetLastError()[0].name == "cudaErrorMemoryAllocation"
    assert cuda.cudaGetLastError()[0].name == "cudaSuccess"


def test_sticky_errors_stay(simulated: Any, cuda: Any, memory: Memory) -> None:
    simulated.sticky_after(1)
    memory.up()
    for _ in range(2):
        assert cuda.cudaStreamSynchronize(memory.stream)[0].name == "cudaErrorIllegalAddress"
    assert cuda.cudaMemGetInfo() == (cuda.cudaError_t.cudaErrorIllegalAddress, None, None)
    for free, handle in (
        (cuda.cudaFree, memory.device),
        (cuda.cudaFreeHost, memory.host),
        (cuda.cudaStreamDestroy, memory.stream),
    ):
        assert free(handle)[0].name == "cudaErrorIllegalAddress"
    simulated.check_no_leaks()


def _capture(cuda: Any, memory: Memory, mode: str = "ThreadLocal") -> Any:
    modes = cuda.cudaStreamCaptureMode
    return cuda.cudaStreamBeginCapture(memory.stream, getattr(modes, f"cudaStreamCaptureMode{mode}"))


def test_a_graph_records_and_repeats(simulated: Any, cuda: Any, memory: Memory) -> None:
    _good(_capture(cuda, memory))
    assert _good(cuda.cudaStreamIsCapturing(memory.stream)).name == "cudaStreamCaptureStatusActive"
    memory.up()
    graph = _good(cuda.cudaStreamEndCapture(memory.stream))
    executable = _good(cuda.cudaGraphInstantiate(graph, 0))
    _good(cuda.cudaGraphDestroy(graph))
    memory.wait()
    assert simulated.since() == {}
    for value in (1, 2):
        memory.view[:] = value
        _good(cuda.cudaGraphLaunch(executable, memory.stream))
        memory.wait()
        memory.down()
        memory.wait()
        assert (memory.view == value).all()
    _good(cuda.cudaFree(memory.device))
    with simulated.violation("was freed before"):
        cuda.cudaGraphLaunch(executable, memory.stream)
    _good(cuda.cudaGraphExecDestroy(executable))
    with simulated.violation("not an executable graph"):
        cuda.cudaGraphLaunch(executable, memory.stream)


def test_a_forbidden_call_invalidates_a_capture(simulated: Any, cuda: Any, memory: Memory) -> None:
    for spoil in (lambda: cuda.cudaMalloc(1), lambda: cuda.cudaStreamSynchronize(memory.stream)):
        _good(_capture(cuda, memory))
        assert spoil()[0].name == "cudaErrorStreamCaptureUnsupported"
        assert cuda.cudaStreamEndCapture(memory.stream)[0].name == "cudaErrorStreamCaptureInvalidated"
    _good(_capture(cuda, memory, "Relaxed"))
    _good(cuda.cudaMalloc(1))
    _good(cuda.cudaStreamEndCapture(memory.stream))
    simulated.fail_capture()
    assert _capture(cuda, memory)[0].name == "cudaErrorStreamCaptureUnsupported"
    assert cuda.cudaStreamEndCapture(memory.stream)[0].name == "cudaErrorIllegalState"


def test_another_thread_may_allocate_unless_the_capture_is_global(cuda: Any, memory: Memory) -> None:
    import threading

    def elsewhere() -> str:
        results: list[str] = []
        thread = threading.Thread(target=lambda: results.append(cuda.cudaMalloc(1)[0].name))
        thread.start()
        thread.join()
        return results[0]

    _good(_capture(cuda, memory))
    assert elsewhere() == "cudaSuccess"
    _good(cuda.cudaStreamEndCapture(memory.stream))
    _good(_capture(cuda, memory, "Global"))
    assert elsewhere() == "cudaErrorStreamCaptureUnsupported"


def test_leaks_and_swallowed_violations_are_found(simulated: Any, cuda: Any, memory: Memory) -> None:
    event = _good(cuda.cudaEventCreate())
    with pytest.raises(AssertionError, match=r"pinned memory .*; device memory .*; stream .*; event "):
        simulated.check_no_leaks()
    _good(cuda.cudaFree(memory.device))
    _good(cuda.cudaFreeHost(memory.host))
    _good(cuda.cudaStreamDestroy(memory.stream))
    _good(cuda.cudaEventDestroy(event))
    simulated.check_no_leaks()
    try:
        cuda.cudaFree(memory.device)
    except Exception:  # noqa: BLE001 - what the test is about
        with pytest.raises(AssertionError, match=r"1 violations were swallowed.*freed twice"):
            simulated.check_no_leaks()
    from simulated.errors import violations

    violations.clear()


def test_destroyed_handles_are_refused(simulated: Any, cuda: Any, memory: Memory) -> None:
    _good(cuda.cudaStreamDestroy(memory.stream))
    with simulated.violation("not a stream"):
        memory.up()
    event = _good(cuda.cudaEventCreate())
    _good(cuda.cudaEventDestroy(event))
    with simulated.violation("not an event"):
        cuda.cudaEventRecord(event, 0)


def test_the_module_rejects_what_the_real_one_rejects(simulated: Any, cuda: Any) -> None:
    with pytest.raises(AttributeError):
        cuda.cudaMallocPinned  # noqa: B018
    with pytest.raises(TypeError):
        cuda.cudaMalloc()
    with pytest.raises(TypeError):
        cuda.cudaMalloc(nbytes=4)
    with pytest.raises(OverflowError):
        cuda.cudaMalloc(-1)
    with simulated.violation("cudaMallocManaged is not simulated"):
        cuda.cudaMallocManaged  # noqa: B018
    assert cuda.cudaMemcpyKind.cudaMemcpyHostToDevice.value == 1


def test_signatures_and_results_are_the_real_ones(simulated: Any, cuda: Any) -> None:
    """Without a driver the real functions fail, with tuples of the same length as failures here."""
    from simulated.calls import FUNCTIONS

    real = cuda._real
    simulated.sticky_after(0)
    for name in FUNCTIONS:
        own, original = (inspect.signature(getattr(module, name)).parameters for module in (cuda, real))
        assert list(own) == list(original)
    no_arguments = [name for name in FUNCTIONS if not inspect.signature(getattr(real, name)).parameters]
    assert len(no_arguments) > 5
    for name in no_arguments:
        assert len(getattr(cuda, name)()) == len(getattr(real, name)()), name


def test_a_wrong_signature_is_found(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from simulated.cudart import Cudart

    monkeypatch.setattr(Cudart, "cudaMalloc", lambda self, nbytes: None)
    with simulated.violation("cudaMalloc takes"):
        simulated.install()
