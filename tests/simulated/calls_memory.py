"""Simulated CUDA functions that allocate, free, copy and fill memory."""

__all__ = ["MemoryCalls"]

from typing import Any

from simulated.calls import Calls, Failure, address, returns, size_of
from simulated.errors import SimulationError
from simulated.memory import Place, Span
from simulated.streams import Work


class MemoryCalls(Calls):
    """Functions of device memory and pinned host memory, addressed by pointer."""

    @returns(1, unsafe=True)
    def cudaMalloc(self, size: Any) -> int:  # noqa: N802
        return self._allocate(size_of(size), "device")

    @returns(1)
    def cudaMallocAsync(self, size: Any, hStream: Any) -> int:  # noqa: N802, N803
        stream = self.stream(hStream)
        if stream.captured is not None:
            raise SimulationError("memory allocated by a graph is not simulated")
        pointer = self._allocate(size_of(size), "device")
        span = self._device.memory.device(pointer, 0, "cudaMallocAsync")
        whole = Span(span.block, 0, span.block.size, written=True)
        self._device.streams.enqueue(stream, Work("cudaMallocAsync", lambda: None, (whole,)))
        return pointer

    @returns(1, unsafe=True)
    def cudaMallocHost(self, size: Any) -> int:  # noqa: N802
        return self._allocate(size_of(size), "pinned")

    @returns(1, unsafe=True)
    def cudaHostAlloc(self, size: Any, flags: int) -> int:  # noqa: N802
        return self._allocate(size_of(size), "pinned")

    @returns(0, synchronizes=True)
    def cudaFree(self, devPtr: Any) -> None:  # noqa: N802, N803
        self._free(address(devPtr), "device")

    @returns(0, synchronizes=True)
    def cudaFreeHost(self, ptr: Any) -> None:  # noqa: N802
        self._free(address(ptr), "pinned")

    @returns(0)
    def cudaFreeAsync(self, devPtr: Any, hStream: Any) -> None:  # noqa: N802, N803
        pointer, stream = address(devPtr), self.stream(hStream)
        if stream.captured is not None:
            raise SimulationError("memory freed by a graph is not simulated")
        block = self._device.memory.device(pointer, 0, "cudaFreeAsync").block
        if block.address != pointer or block.freeing:
            raise SimulationError(f"cudaFreeAsync: {pointer:#x} is freed twice, or is not the start of an allocation")
        whole = Span(block, 0, block.size, written=True)
        free = Work("cudaFreeAsync", lambda: self._device.memory.free(pointer, "device") and None, (whole,))
        self._device.streams.enqueue(stream, free)
        block.freeing = True

    @returns(0, unsafe=True)
    def cudaMemcpy(self, dst: Any, src: Any, count: Any, kind: Any) -> None:  # noqa: N802
        stream = self._device.streams.default
        if kind is self._real.cudaMemcpyKind.cudaMemcpyHostToHost:
            raise SimulationError("cudaMemcpy from host to host is not simulated")
        self._device.streams.enqueue(stream, self._copy("cudaMemcpy", dst, src, count, kind))
        self._device.streams.synchronize(stream)

    @returns(0)
    def cudaMemcpyAsync(self, dst: Any, src: Any, count: Any, kind: Any, stream: Any) -> None:  # noqa: N802
        self._device.streams.enqueue(self.stream(stream), self._copy("cudaMemcpyAsync", dst, src, count, kind))

    @returns(0, unsafe=True)
    def cudaMemset(self, devPtr: Any, value: int, count: Any) -> None:  # noqa: N802, N803
        stream = self._device.streams.default
        self._device.streams.enqueue(stream, self._fill("cudaMemset", devPtr, value, count))
        self._device.streams.synchronize(stream)

    @returns(0)
    def cudaMemsetAsync(self, devPtr: Any, value: int, count: Any, stream: Any) -> None:  # noqa: N802, N803
        self._device.streams.enqueue(self.stream(stream), self._fill("cudaMemsetAsync", devPtr, value, count))

    def _allocate(self, size: int, place: Place) -> int:
        if size == 0:
            return 0
        block = self._device.memory.allocate(size, place, f"allocation {self._device.calls.total()}")
        if block is None:
            raise Failure("cudaErrorMemoryAllocation")
        return block.address

    def _free(self, pointer: int, place: Place) -> None:
        if pointer:
            # Both functions wait for the device, by documentation and in practice.
            self._device.streams.synchronize_all()
            self._device.memory.free(pointer, place)

    def _copy(self, name: str, dst: Any, src: Any, count: Any, kind: Any) -> Work:
        if not isinstance(kind, self._real.cudaMemcpyKind):
            raise TypeError(f"{name}: Argument 'kind' has incorrect type (expected cudaMemcpyKind, got {type(kind)})")
        size, memory = size_of(count), self._device.memory
        target = memory.find(address(dst), size, f"{name} to")
        source = memory.find(address(src), size, f"{name} from")
        if target is None or source is None:
            raise SimulationError(f"{name}: {address(dst if target is None else src):#x} is neither device nor pinned"
                                  " memory; pageable memory makes copies wait, and its bounds are unknown")  # fmt: skip
        places = {"device": "Device", "pinned": "Host"}
        way = f"cudaMemcpy{places[source.block.place]}To{places[target.block.place]}"
        if kind.name not in (way, "cudaMemcpyDefault"):
            raise SimulationError(f"{name}: {kind.name} from {source.block} to {target.block}")
        written = Span(target.block, target.start, target.stop, written=True)

        def run() -> None:
            written.bytes[:] = source.bytes
            self._device.moved(way[len("cudaMemcpy") :], size)

        return Work(f"{name} of {size} bytes", run, (source, written))

    def _fill(self, name: str, pointer: Any, value: int, count: Any) -> Work:
        target = self._device.memory.device(address(pointer), size_of(count), name)
        written = Span(target.block, target.start, target.stop, written=True)

        def run() -> None:
            written.bytes[:] = value & 0xFF

        return Work(name, run, (written,))
