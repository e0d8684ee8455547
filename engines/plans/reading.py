"""Read a plan into memory with several threads, which check the digest of every chunk while it is in their cache.

What is handed out was checked in the very memory that is handed out: no byte is read from the file again after its
check. A chunk that was dropped and is needed again is read and checked again.
"""

__all__ = ["PlanReader", "plan_memory", "reading_threads"]

import contextlib
import errno
import hashlib
import mmap
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from sdxl_trt.engines.errors import ResourceError, SdxlTrtError, explain_os_error

BLOCK = 1 << 20
"""The bytes that are read, and then hashed from the cache; between two blocks a thread looks whether it must stop."""
_MOST_THREADS = 4


def reading_threads() -> int:
    """Return the number of threads that read a plan by default: one for each core, at most four."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(_MOST_THREADS, cores or 1)


class PlanReader:
    """The bytes of the file at `path`, which threads read and check from construction on, the first chunk first.

    `digests` are the hex sha256 of its chunks of `chunk` bytes; `damaged` makes the error for a reason in words. The
    reader holds as much memory as the file has bytes, less the chunks that were dropped. It allocates it, unless it is
    given `memory` of at least that size, which nothing else uses meanwhile. Its methods may be called from any thread.
    Raises what `damaged` makes for a file of another size, and ResourceError.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        chunk: int,
        digests: tuple[str, ...],
        damaged: Callable[[str], SdxlTrtError],
        threads: int | None = None,
        memory: mmap.mmap | None = None,
    ) -> None:
        self.size = size
        self._path, self._chunk, self._digests, self._damaged = path, chunk, digests, damaged
        self._changed = threading.Condition()
        self._next = 0
        self._ready: set[int] = set()
        self._dropped: set[int] = set()
        self._stopped = False
        self._failure: SdxlTrtError | None = None
        try:
            found = path.stat().st_size
            if found != size:
                raise damaged(f"{found} bytes, but the manifest says {size}")
            self._map: mmap.mmap | None = plan_memory(size) if memory is None else memory
        except (OSError, MemoryError) as exc:
            raise self._explain(exc) from exc
        self._memory: memoryview | None = memoryview(self._map)[:size]
        count = min(reading_threads() if threads is None else threads, len(digests))
        self._threads = [
            threading.Thread(target=self._read_chunks, name=f"read {path.name} {number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pieces(self) -> int:
        """The number of chunks."""
        return len(self._digests)

    @property
    def complete(self) -> bool:
        """Whether every chunk is in memory and checked."""
        with self._changed:
            return len(self._ready) == self.pieces

    def wait(self) -> None:
        """Return when every chunk has been checked, or after `close`. Raises CorruptError, ResourceError."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or self._failure or len(self._ready) + len(self._dropped) == self.pieces
            )
            self._raise_failure()

    def at(self, offset: int) -> memoryview:
        """Return the checked bytes from `offset` to the end of its chunk, read-only; wait until they are there.

        They stay valid until they are dropped. Raises CorruptError, ResourceError; SdxlTrtError after `close`.
        """
        index = offset // self._chunk
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or self._failure or index in self._ready or index in self._dropped
            )
            self._raise_failure()
            again = index in self._dropped
            self._dropped.discard(index)  # only one caller reads it again
        if again:
            self._take(index)
        with self._changed:
            self._raise_failure()
            if self._memory is None or index not in self._ready:
                raise SdxlTrtError(f"reading {self._path}: it was stopped; load the engine again")
            return self._memory[offset : self._span(index)[1]].toreadonly()

    def whole(self) -> memoryview:
        """Return all bytes, read-only, when they are checked; valid even after `close`. Raises what `at` raises."""
        for index in range(self.pieces):
            self.at(index * self._chunk)
        with self._changed:
            if self._memory is None:
                raise SdxlTrtError(f"reading {self._path}: it was stopped; load the engine again")
            return self._memory.toreadonly()

    def drop(self, below: int) -> None:
        """Give the memory of the chunks that end at offset `below` or earlier back to the system, where it takes it.

        The caller must not use views of them any longer.
        """
        with self._changed:
            if self._map is None:
                return
            for index in [index for index in self._ready if self._span(index)[1] <= below]:
                start, stop = self._span(index)
                whole = start % mmap.PAGESIZE == 0 and (stop % mmap.PAGESIZE == 0 or stop == self.size)
                if whole and _give_back(self._map, start, stop - start):
                    self._ready.discard(index)
                    self._dropped.add(index)

    def close(self) -> None:
        """Stop reading, wait for the threads to end, and give up the memory. May be called twice."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        with self._changed:
            self._memory = self._map = None

    def _read_chunks(self) -> None:
        """Take chunks until all have been taken: the work of every thread."""
        while True:
            with self._changed:
                if self._stopped or self._failure or self._next == self.pieces:
                    return
                index = self._next
                self._next += 1
            self._take(index)

    def _take(self, index: int) -> None:
        """Read and check a chunk, and enter it among the ready ones; enter the error if it fails."""
        failure: SdxlTrtError | None = None
        try:
            checked = self._check(index)
        except SdxlTrtError as exc:
            checked, failure = False, exc
        except Exception as exc:  # noqa: BLE001 - who waits for the chunk raises it
            checked, failure = False, self._explain(exc)
        with self._changed:
            if checked:
                self._ready.add(index)
            self._failure = self._failure or failure
            self._changed.notify_all()

    def _check(self, index: int) -> bool:
        """Read a chunk; return whether it was read to its end. Raises the error of a digest that differs."""
        start, stop = self._span(index)
        digest, memory = hashlib.sha256(), self._memory
        with self._path.open("rb", buffering=0) as file:
            file.seek(start)
            for at in range(start, stop, BLOCK):
                if self._stopped or memory is None:
                    return False
                block = memory[at : min(at + BLOCK, stop)]
                done = 0
                while done < len(block):
                    got = file.readinto(block[done:])
                    if not got:
                        raise self._damaged("it became shorter while it was read")
                    done += got
                digest.update(block)
        if digest.hexdigest() != self._digests[index]:
            where = "its sha256 is" if self.pieces == 1 else f"the sha256 of its bytes {start} to {stop - 1} is"
            raise self._damaged(f"{where} not the manifest's")
        return True

    def _span(self, index: int) -> tuple[int, int]:
        """Return the offsets of a chunk's first byte and of the byte after its last one."""
        return index * self._chunk, min((index + 1) * self._chunk, self.size)

    def _explain(self, exc: Exception) -> SdxlTrtError:
        doing = f"reading {self._path}"
        if isinstance(exc, MemoryError) or (isinstance(exc, OSError) and exc.errno == errno.ENOMEM):
            return ResourceError(f"{doing}: out of host memory ({self.size / 1e9:.1f} GB); close other programs")
        return explain_os_error(exc, doing) if isinstance(exc, OSError) else SdxlTrtError(f"{doing}: {exc}")

    def _raise_failure(self) -> None:
        """Raise the error of a thread, a new one for every caller: each has a traceback of its own."""
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))


def plan_memory(size: int) -> mmap.mmap:
    """Return anonymous memory of at least `size` bytes, in huge pages where the system has them.

    A page costs a fault when it is first written: small ones would cost about as much time as the hashing.
    """
    if sys.platform == "win32":
        return mmap.mmap(-1, max(size, 1))
    else:  # noqa: RET505 - the type checker reads the branches of a platform
        memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        return memory


def _give_back(memory: mmap.mmap, start: int, length: int) -> bool:
    """Return whether the system took back these pages, which are zero from then on; Windows keeps them."""
    if sys.platform == "win32" or not hasattr(mmap, "MADV_DONTNEED"):
        return False
    else:  # noqa: RET505 - the type checker reads the branches of a platform
        memory.madvise(mmap.MADV_DONTNEED, start, length)
        return True
