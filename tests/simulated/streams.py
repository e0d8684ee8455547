"""Streams, events and graphs: work is deferred until the host waits for it, and must be ordered if it shares memory.

Work runs as late as CUDA allows: when the host synchronizes. So a host that reads a result too early does not find
it, and one that overwrites a buffer too early is caught. Vector clocks decide whether two pieces of work are ordered:
one count per stream, joined at events and synchronizations.
"""

__all__ = ["Event", "Graph", "Stream", "Streams", "Work"]

import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from simulated.errors import SimulationError
from simulated.memory import POISON, Span

Clock = dict[int, int]


@dataclass
class Work:
    """A piece of work for a stream: the memory it uses, the work it waits for, and a check before it runs."""

    label: str
    run: Callable[[], None]
    spans: tuple[Span, ...] = ()
    after: tuple[tuple["Stream", int], ...] = ()
    check: Callable[[], None] | None = None
    index: int = 0
    # Checksums of the pinned bytes that it will read, taken when it was queued.
    sums: tuple[tuple[Span, int], ...] = ()

    def again(self) -> "Work":
        """Return a copy to queue, since a graph is launched many times."""
        return Work(self.label, self.run, self.spans, check=self.check)


@dataclass(eq=False)
class Stream:
    """A queue of work in order; `clock` is the work of all streams that precedes its next work."""

    handle: int
    blocking: bool
    alive: bool = True
    count: int = 0
    clock: Clock = field(default_factory=dict)
    queue: deque[Work] = field(default_factory=deque)
    captured: list[Work] | None = None
    invalid: bool = False
    mode: int = 0
    thread: int = 0


@dataclass(eq=False)
class Event:
    """A point in a stream's work."""

    handle: int
    timed: bool
    alive: bool = True
    stream: Stream | None = None
    index: int = 0
    clock: Clock = field(default_factory=dict)
    captured: bool = False
    done: float | None = None


@dataclass(eq=False)
class Graph:
    """The work that was enqueued on a stream during its capture; an `executable` graph can be launched."""

    handle: int
    work: list[Work]
    executable: bool = False
    alive: bool = True


def _join(clock: Clock, other: Clock) -> None:
    for stream, index in other.items():
        clock[stream] = max(clock.get(stream, 0), index)


def _check_sums(work: Work) -> None:
    for span, checksum in work.sums:
        if zlib.crc32(span.bytes) != checksum:
            raise SimulationError(
                f"{work.label}: the host changed {span.block} while the copy that reads it was still queued;"
                " synchronize first"
            )


class Streams:
    """All streams of the device; `host` is the clock of the work that the host has waited for."""

    def __init__(self) -> None:
        self.default = Stream(0, blocking=True)
        self.all: dict[int, Stream] = {0: self.default}
        self.host: Clock = {}
        self.executed = 0

    def add(self, handle: int, *, blocking: bool) -> Stream:
        """Return a new stream."""
        self.all[handle] = Stream(handle, blocking, clock={})
        return self.all[handle]

    def enqueue(self, stream: Stream, work: Work, *, knows: Clock | None = None) -> None:
        """Queue `work`, or record it if the stream is captured; raise SimulationError if it races with other work."""
        if stream.captured is not None:
            stream.captured.append(work)
            return
        for span in work.spans:
            if not span.block.alive or span.block.freeing:
                raise SimulationError(f"{work.label}: {span.block} was freed before")
        implied = self._implied(stream)
        for other, _ in implied:
            _join(stream.clock, other.clock)
        _join(stream.clock, knows or {})
        _join(stream.clock, self.host)
        stream.count += 1
        work.index, work.after = stream.count, (*work.after, *implied)
        stream.clock[stream.handle] = stream.count
        for span in work.spans:
            self._order(stream, work, span)
        self._note_host_memory(work)
        stream.queue.append(work)

    def _implied(self, stream: Stream) -> list[tuple[Stream, int]]:
        """Return the work to wait for because of the legacy default stream, which orders all blocking streams."""
        if stream is self.default:
            others = [other for other in self.all.values() if other.blocking and other is not stream]
        else:
            others = [self.default] if stream.blocking else []
        return [(other, other.count) for other in others if other.count]

    def _order(self, stream: Stream, work: Work, span: Span) -> None:
        touched = span.block.touched
        for (start, stop, other, written), index in list(touched.items()):
            if start >= span.stop or span.start >= stop or not (written or span.written):
                continue
            if stream.clock.get(other, 0) < index:
                raise SimulationError(
                    f"{work.label} on stream {stream.handle:#x} races with work on stream {other:#x} over {span.block}:"
                    " nothing orders them; record an event in one stream and let the other wait for it"
                )
            if span.written and span.start <= start and stop <= span.stop:
                del touched[start, stop, other, written]
        touched[span.start, span.stop, stream.handle, span.written] = work.index

    def _note_host_memory(self, work: Work) -> None:
        """Store checksums of pinned bytes to be read, and poison those to be written: the host must not touch either.

        Skips bytes that queued work will still write (or read): stream order decides their content.
        """
        pending = [span for stream in self.all.values() for queued in stream.queue for span in queued.spans]
        sums = []
        for span in work.spans:
            if span.block.place != "pinned":
                continue
            if not span.written:
                if not any(other.written and other.overlaps(span) for other in pending):
                    sums.append((span, zlib.crc32(span.bytes)))
            elif not any(other.overlaps(span) for other in pending):
                span.bytes[:] = POISON
        work.sums = tuple(sums)

    def run_until(self, stream: Stream, index: int) -> None:
        """Run the work of `stream` up to `index`, after the work that it waits for."""
        while stream.queue and stream.queue[0].index <= index:
            for other, needed in stream.queue[0].after:
                self.run_until(other, needed)
            work = stream.queue.popleft()
            _check_sums(work)
            if work.check:
                work.check()
            work.run()
            self.executed += 1

    def synchronize(self, stream: Stream, index: int | None = None, clock: Clock | None = None) -> None:
        """Make the host wait for a stream, or for one point in it."""
        self.run_until(stream, stream.count if index is None else index)
        _join(self.host, stream.clock if clock is None else clock)

    def synchronize_all(self) -> None:
        """Make the host wait for all streams."""
        for stream in list(self.all.values()):
            self.synchronize(stream)

    def record(self, stream: Stream, event: Event) -> None:
        """Set `event` to the current end of `stream`."""

        index = stream.count + 1

        def finish() -> None:
            if event.index == index:  # else it was recorded again
                event.done = float(self.executed)

        self.enqueue(stream, Work("cudaEventRecord", finish))
        event.captured = stream.captured is not None
        if not event.captured:
            event.stream, event.index, event.clock, event.done = stream, stream.count, dict(stream.clock), None

    def wait(self, stream: Stream, event: Event) -> None:
        """Make `stream` wait for `event`."""
        if event.stream is not None:
            after = ((event.stream, event.index),)
            self.enqueue(stream, Work("cudaStreamWaitEvent", lambda: None, after=after), knows=event.clock)

    def launch(self, stream: Stream, graph: Graph) -> None:
        """Queue the work of `graph`."""
        for work in graph.work:
            self.enqueue(stream, work.again())

    def capturing(self) -> list[Stream]:
        """Return the streams in capture mode."""
        return [stream for stream in self.all.values() if stream.captured is not None]
