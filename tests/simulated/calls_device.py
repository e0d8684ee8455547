"""Simulated CUDA functions that query devices and errors."""

__all__ = ["DeviceCalls"]

from typing import Any

from simulated.calls import Calls, returns
from simulated.errors import SimulationError


class DeviceCalls(Calls):
    """Functions of one device and its last error."""

    def __init__(self, device: Any, real: Any) -> None:
        super().__init__(device, real)
        self._last = real.cudaError_t.cudaSuccess

    @returns(1)
    def cudaGetDeviceCount(self) -> int:  # noqa: N802
        return 1

    @returns(0)
    def cudaSetDevice(self, device: int) -> None:  # noqa: N802
        self.require(device == 0, "cudaErrorInvalidDevice")

    @returns(1)
    def cudaGetDevice(self) -> int:  # noqa: N802
        return 0

    @returns(1)
    def cudaGetDeviceProperties(self, device: int) -> Any:  # noqa: N802
        self.require(device == 0, "cudaErrorInvalidDevice")
        properties = self._real.cudaDeviceProp()
        properties.name = self._device.name.encode().ljust(256, b"\0")
        properties.major, properties.minor = self._device.compute_capability
        properties.totalGlobalMem = self._device.memory.size
        properties.textureAlignment = properties.memPitch = 512
        properties.multiProcessorCount, properties.warpSize = 128, 32
        return properties

    @returns(1)
    def cudaDeviceGetAttribute(self, attr: Any, device: int) -> int:  # noqa: N802
        self.require(device == 0, "cudaErrorInvalidDevice")
        major, minor = self._device.compute_capability
        known = {"cudaDevAttrComputeCapabilityMajor": major, "cudaDevAttrComputeCapabilityMinor": minor,
                 "cudaDevAttrMemoryPoolsSupported": 1, "cudaDevAttrMultiProcessorCount": 128}  # fmt: skip
        if attr.name not in known:
            raise SimulationError(f"{attr} is not simulated; add it to tests/simulated")
        return known[attr.name]

    @returns(1)
    def cudaDriverGetVersion(self) -> int:  # noqa: N802
        return 13050

    @returns(1)
    def cudaRuntimeGetVersion(self) -> int:  # noqa: N802
        return 13050

    @returns(2)
    def cudaMemGetInfo(self) -> tuple[int, int]:  # noqa: N802
        memory = self._device.memory
        return memory.size - memory.current, memory.size

    @returns(1)
    def cudaGetErrorString(self, error: Any) -> bytes:  # noqa: N802
        return bytes(self._real.cudaGetErrorString(error)[1])

    @returns(1)
    def cudaGetErrorName(self, error: Any) -> bytes:  # noqa: N802
        return bytes(self._real.cudaGetErrorName(error)[1])

    @returns(0)
    def cudaGetLastError(self) -> Any:  # noqa: N802
        last = self._last
        self._last = self._real.cudaError_t.cudaSuccess
        return last

    @returns(0)
    def cudaPeekAtLastError(self) -> Any:  # noqa: N802
        return self._last

    @returns(0, synchronizes=True)
    def cudaDeviceSynchronize(self) -> None:  # noqa: N802
        self._device.streams.synchronize_all()
