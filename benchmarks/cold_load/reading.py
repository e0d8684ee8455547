"""Read and check a file of a plan's size, in a process of its own for every measurement.

Each process starts with no memory of the plan, as a cold start does, and states its time and the memory it took.
"""

__all__ = ["WAYS", "Lap", "Way", "make_file", "measure_way"]

import hashlib
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import msgspec
import numpy as np

from sdxl_trt.engines import CorruptError
from sdxl_trt.engines.build import PlanFile
from sdxl_trt.engines.bundle import Chunks
from sdxl_trt.engines.host import process_memory, sha256_file
from sdxl_trt.engines.plans import PlanReader, plan_memory

Way = Literal["sha256", "file", "before", "whole", "touched", "stream"]
WAYS: tuple[Way, ...] = get_args(Way)
_BEFORE = 64 << 20
_RANDOM = 64 << 20


class Lap(msgspec.Struct, frozen=True):
    """One measurement: seconds of wall and processor time, and the most bytes held beyond those held before it."""

    way: str
    threads: int
    seconds: float
    processor_seconds: float
    memory: int


class _File(msgspec.Struct, frozen=True):
    size: int
    sha256: str
    chunks: Chunks


def make_file(path: Path, size: int) -> None:
    """Write `size` random bytes to `path`, with the digests that the builder computes beside it, unless they exist."""
    facts = path.with_suffix(".json")
    if facts.exists() and path.stat().st_size == size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    block = np.random.default_rng(0).bytes(min(_RANDOM, size))
    with path.open("wb") as file:
        plan = PlanFile(file)
        while plan.size < size:
            plan.write(memoryview(block)[: min(len(block), size - plan.size)])
    found = _File(size, plan.sha256, plan.chunks)
    facts.write_bytes(msgspec.json.encode(found))


def measure_way(way: Way, path: Path, threads: int) -> Lap:
    """Return a measurement of one way in a new process. Raises subprocess.CalledProcessError if it fails."""
    command = [sys.executable, "-P", "-m", __name__, way, str(path), str(threads)]
    done = subprocess.run(command, capture_output=True, check=True)  # noqa: S603 - our own module
    return msgspec.json.decode(done.stdout, type=Lap)


def _only_hash(path: Path, facts: _File, _threads: int) -> Callable[[], None]:
    """Hash as many bytes in one thread, from memory that is there already: nothing is read, no page is new."""
    with path.open("rb") as file:
        block = memoryview(file.read(min(_RANDOM, facts.size)))

    def run() -> None:
        digest = hashlib.sha256()
        for start in range(0, facts.size, len(block)):
            digest.update(block[: min(len(block), facts.size - start)])

    return run


def _file_digest(path: Path, facts: _File, _threads: int) -> None:
    """Hash the file in one thread: it is copied from the page cache to a small buffer."""
    if sha256_file(path) != facts.sha256:
        raise CorruptError(f"{path}: its sha256 is another")


def _before(path: Path, facts: _File, _threads: int) -> None:
    """Read and hash in turn, in one thread: how plans were read before they had digests of chunks."""
    buffer = np.empty(facts.size, np.uint8).data
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in range(0, facts.size, _BEFORE):
            part = buffer[start : start + _BEFORE]
            file.readinto(part)
            digest.update(part)
    if digest.hexdigest() != facts.sha256:
        raise CorruptError(f"{path}: its sha256 is another")


def _reader(path: Path, facts: _File, threads: int, memory: mmap.mmap | None = None) -> PlanReader:
    return PlanReader(path, facts.size, facts.chunks.size, facts.chunks.sha256, CorruptError, threads, memory)


def _whole(path: Path, facts: _File, threads: int, memory: mmap.mmap | None = None) -> None:
    """Read and check the plan into new memory, or into `memory`."""
    reader = _reader(path, facts, threads, memory)
    reader.whole()
    reader.close()


def _touched(path: Path, facts: _File, threads: int) -> Callable[[], None]:
    """Read and check the plan into memory that was written before: the system has to find and clear no page."""
    memory = plan_memory(facts.size)
    np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1
    return partial(_whole, path, facts, threads, memory)


def _stream(path: Path, facts: _File, threads: int) -> None:
    """Read and check the plan chunk by chunk, and drop every chunk after use, as TensorRT's stream reader does."""
    reader, at = _reader(path, facts, threads), 0
    while at < facts.size:
        reader.drop(at)
        at += len(reader.at(at))
    reader.close()


def _prepared(way: str, path: Path, threads: int) -> Callable[[], None]:
    """Return what is to be measured."""
    facts = msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=_File)
    if way == "sha256":
        return _only_hash(path, facts, threads)
    if way == "touched":
        return _touched(path, facts, threads)
    ways: dict[str, Callable[[Path, _File, int], None]] = {
        "file": _file_digest, "before": _before, "whole": _whole, "stream": _stream,
    }  # fmt: skip
    return partial(ways[way], path, facts, threads)


def main(way: str, path: Path, threads: int) -> None:
    """Do one measurement in this process, and print it as JSON."""
    run = _prepared(way, path, threads)
    held = process_memory().get("VmRSS", 0)
    started, processor = time.perf_counter(), time.process_time()
    run()
    seconds, used = time.perf_counter() - started, time.process_time() - processor
    memory = max(process_memory().get("VmHWM", 0) - held, 0)
    lap = Lap(way, threads, seconds, used, memory)
    os.write(1, msgspec.json.encode(lap))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
