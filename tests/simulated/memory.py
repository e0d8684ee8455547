"""Simulated device memory and pinned host memory: addresses, lifetimes, bounds, and bytes in use."""

__all__ = ["Block", "Memory", "Span"]

import bisect
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from simulated.errors import SimulationError

ALIGNMENT = 256
"""The alignment that cudaMalloc guarantees and TensorRT requires."""
POISON = 0xFF
"""The byte of memory that was never written: NaN in fp16 and fp32, -1 in int64."""
_DEVICE_START = 0x7_0000_0000_00
_GAP = 1 << 20
_GUARD = 64
_GUARD_BYTE = 0xA5

Place = Literal["device", "pinned"]


@dataclass(eq=False)
class Block:
    """One allocation. Bytes of device memory are created on first use: most of it is scratch."""

    address: int
    size: int
    place: Place
    label: str
    alive: bool = True
    freeing: bool = False
    """Passed to cudaFreeAsync, which has not run yet."""
    # The index of the latest work on each (start, stop, stream, written).
    touched: dict[tuple[int, int, int, bool], int] = field(default_factory=dict)
    _bytes: NDArray[np.uint8] | None = None
    _whole: NDArray[np.uint8] | None = None

    @property
    def bytes(self) -> NDArray[np.uint8]:
        """The contents of the block."""
        if self._bytes is None:
            self._bytes = np.full(self.size, POISON, np.uint8)
        return self._bytes

    def pin(self) -> None:
        """Allocate real host memory for the block, with a guard behind it."""
        self._whole = np.full(self.size + ALIGNMENT + _GUARD, POISON, np.uint8)
        start = -self._whole.ctypes.data % ALIGNMENT
        self._whole[start + self.size :] = _GUARD_BYTE
        self._bytes = self._whole[start : start + self.size]
        self.address = self._whole.ctypes.data + start

    def check_guard(self) -> None:
        """Raise SimulationError if the host wrote past the end, or into freed memory."""
        if self._whole is None or self._bytes is None:
            return
        start = self.address - self._whole.ctypes.data
        if (self._whole[start + self.size :] != _GUARD_BYTE).any():
            raise SimulationError(f"{self} was written past its end by the host")
        if not self.alive and (self._bytes != POISON).any():
            raise SimulationError(f"{self} was written by the host after it had been freed")

    def __str__(self) -> str:
        return f"{self.place} memory {self.address:#x} of {self.size} bytes ({self.label})"


@dataclass(frozen=True)
class Span:
    """The bytes of a block that a piece of work reads or writes."""

    block: Block
    start: int
    stop: int
    written: bool = False

    @property
    def bytes(self) -> NDArray[np.uint8]:
        """The contents; raises SimulationError if the block was freed."""
        if not self.block.alive:
            raise SimulationError(f"work ran on {self.block} after it had been freed")
        return self.block.bytes[self.start : self.stop]

    def overlaps(self, other: "Span") -> bool:
        """Return whether the two share a byte."""
        return self.block is other.block and self.start < other.stop and other.start < self.stop


class Memory:
    """Finds allocations by pointer and counts the bytes in use on the device."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.current = 0
        self.peak = 0
        self.attempts = 0
        self.failing: set[int] = set()
        self._addresses: list[int] = []
        self._blocks: dict[int, Block] = {}
        self._next = _DEVICE_START

    def reserve(self, size: int) -> bool:
        """Count `size` bytes of the device as used; return False if they do not fit or the call is to fail."""
        self.attempts += 1
        if self.attempts in self.failing or self.current + size > self.size:
            return False
        self.current += size
        self.peak = max(self.peak, self.current)
        return True

    def release(self, size: int) -> None:
        """Count `size` bytes of the device as free."""
        self.current -= size

    def allocate(self, size: int, place: Place, label: str) -> Block | None:
        """Return a new block, or None if it does not fit on the device."""
        if place == "device" and not self.reserve(size):
            return None
        block = Block(self._next, size, place, label)
        if place == "pinned":
            block.pin()
        else:
            # Gaps between allocations and no reuse of addresses: a wrong pointer hits nothing.
            self._next += (size + _GAP) // _GAP * _GAP + _GAP
        bisect.insort(self._addresses, block.address)
        self._blocks[block.address] = block
        return block

    def free(self, pointer: int, place: Place) -> Block:
        """Free the block that begins at `pointer`."""
        block = self._blocks.get(pointer)
        if block is None or block.place != place:
            raise SimulationError(f"{pointer:#x} is freed as {place} memory, but no such allocation begins there")
        if not block.alive:
            raise SimulationError(f"{block} is freed twice")
        block.check_guard()
        block.alive = False
        if place == "device":
            self.release(block.size)
            block._bytes = None
        else:
            block.bytes[:] = POISON
        return block

    def find(self, pointer: int, size: int, doing: str) -> Span | None:
        """Return the bytes at `pointer`, with lifetime and bounds checked; None if there is no allocation."""
        i = bisect.bisect_right(self._addresses, pointer) - 1
        block = self._blocks[self._addresses[i]] if i >= 0 else None
        if block is None or pointer >= block.address + max(block.size, 1):
            return None
        if not block.alive:
            raise SimulationError(f"{doing}: {block} was freed before")
        start = pointer - block.address
        if start + size > block.size:
            raise SimulationError(f"{doing}: {size} bytes at offset {start} overrun {block}")
        return Span(block, start, start + size)

    def device(self, pointer: int, size: int, doing: str, *, aligned: bool = False) -> Span:
        """Return the bytes of device memory at `pointer`."""
        span = self.find(pointer, size, doing)
        if span is None or span.block.place != "device":
            raise SimulationError(f"{doing}: {pointer:#x} is not device memory")
        if aligned and pointer % ALIGNMENT:
            raise SimulationError(f"{doing}: {pointer:#x} is not aligned to {ALIGNMENT} bytes")
        return span

    def pinned(self, pointer: int, size: int, doing: str) -> Span:
        """Return the bytes of pinned host memory at `pointer`."""
        span = self.find(pointer, size, doing)
        if span is None or span.block.place != "pinned":
            raise SimulationError(f"{doing}: {pointer:#x} is not pinned host memory (cudaMallocHost, cudaHostAlloc)")
        return span

    def living(self) -> list[Block]:
        """Return the blocks that were not freed; raise SimulationError if the host wrote out of bounds."""
        for block in self._blocks.values():
            block.check_guard()
        return [block for block in self._blocks.values() if block.alive]
