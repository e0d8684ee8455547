"""Simulated CUDA functions of streams, events, captures and graphs."""

__all__ = ["StreamCalls"]

import threading
from typing import Any

from simulated.calls import Calls, Failure, returns
from simulated.errors import SimulationError
from simulated.streams import Event, Graph, Work


class StreamCalls(Calls):
    """Functions that enqueue and order work, and that capture it into graphs."""

    @returns(1)
    def cudaStreamCreate(self) -> Any:  # noqa: N802
        return self._new_stream(blocking=True)

    @returns(1)
    def cudaStreamCreateWithFlags(self, flags: int) -> Any:  # noqa: N802
        return self._new_stream(blocking=int(flags) != 1)

    @returns(1)
    def cudaStreamCreateWithPriority(self, flags: int, priority: int) -> Any:  # noqa: N802
        return self._new_stream(blocking=int(flags) != 1)

    @returns(0)
    def cudaStreamDestroy(self, stream: Any) -> None:  # noqa: N802
        own = self.stream(stream)
        if own is self._device.streams.default:
            raise SimulationError("the default stream is destroyed")
        self._device.streams.run_until(own, own.count)
        own.alive = False

    @returns(0)
    def cudaStreamSynchronize(self, stream: Any) -> None:  # noqa: N802
        own = self.stream(stream)
        own.invalid = own.captured is not None
        self.require(not own.invalid, "cudaErrorStreamCaptureUnsupported")
        self._device.streams.synchronize(own)

    @returns(0)
    def cudaStreamQuery(self, stream: Any) -> None:  # noqa: N802
        own = self.stream(stream)
        if own.queue:
            # Polling makes progress: each query runs one piece of work.
            self._device.streams.run_until(own, own.queue[0].index)
            raise Failure("cudaErrorNotReady")
        self._device.streams.synchronize(own)

    @returns(0)
    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> None:  # noqa: N802
        own, point = self.stream(stream), self.event(event)
        if own.captured is not None:
            own.invalid = own.invalid or not point.captured
            self.require(point.captured, "cudaErrorStreamCaptureIsolation")
        else:
            self.require(not point.captured, "cudaErrorCapturedEvent")
            self._device.streams.wait(own, point)

    @returns(1)
    def cudaEventCreate(self) -> Any:  # noqa: N802
        return self._new_event(timed=True)

    @returns(1)
    def cudaEventCreateWithFlags(self, flags: int) -> Any:  # noqa: N802
        return self._new_event(timed=not int(flags) & 2)

    @returns(0)
    def cudaEventRecord(self, event: Any, stream: Any) -> None:  # noqa: N802
        self._device.streams.record(self.stream(stream), self.event(event))

    @returns(0)
    def cudaEventSynchronize(self, event: Any) -> None:  # noqa: N802
        point = self.event(event)
        self.require(not point.captured, "cudaErrorCapturedEvent")
        if point.stream is not None:
            self._device.streams.synchronize(point.stream, point.index, point.clock)

    @returns(0)
    def cudaEventQuery(self, event: Any) -> None:  # noqa: N802
        point = self.event(event)
        if point.stream is not None and point.done is None:
            self._device.streams.run_until(point.stream, point.stream.queue[0].index)
            raise Failure("cudaErrorNotReady")

    @returns(1)
    def cudaEventElapsedTime(self, start: Any, end: Any) -> float:  # noqa: N802
        first, last = self.event(start), self.event(end)
        self.require(first.timed and last.timed, "cudaErrorInvalidResourceHandle")
        if first.done is None or last.done is None:
            raise Failure("cudaErrorNotReady")
        return last.done - first.done

    @returns(0)
    def cudaEventDestroy(self, event: Any) -> None:  # noqa: N802
        self.event(event).alive = False

    @returns(0)
    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> None:  # noqa: N802
        own = self.stream(stream)
        self.require(own is not self._device.streams.default, "cudaErrorStreamCaptureUnsupported")
        self.require(own.captured is None, "cudaErrorIllegalState")
        self.require(not self._device.take_capture_failure(), "cudaErrorStreamCaptureUnsupported")
        own.captured, own.invalid = [], self._device.spoils_loads()
        own.mode, own.thread = mode.value, threading.get_ident()

    @returns(1)
    def cudaStreamEndCapture(self, stream: Any) -> Any:  # noqa: N802
        own = self.stream(stream)
        self.require(own.captured is not None, "cudaErrorIllegalState")
        work, own.captured = own.captured or [], None
        self.require(not own.invalid, "cudaErrorStreamCaptureInvalidated")
        return self._real.cudaGraph_t(self._new_graph(work).handle)

    @returns(1)
    def cudaStreamIsCapturing(self, stream: Any) -> Any:  # noqa: N802
        own, status = self.stream(stream), self._real.cudaStreamCaptureStatus
        if own.captured is None:
            return status.cudaStreamCaptureStatusNone
        return status.cudaStreamCaptureStatusInvalidated if own.invalid else status.cudaStreamCaptureStatusActive

    @returns(1)
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:  # noqa: N802
        template = self.graph(graph, executable=False)
        return self._real.cudaGraphExec_t(self._new_graph(template.work, executable=True).handle)

    @returns(0)
    def cudaGraphUpload(self, graphExec: Any, stream: Any) -> None:  # noqa: N802, N803
        self.graph(graphExec, executable=True)
        self.stream(stream)

    @returns(0)
    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> None:  # noqa: N802, N803
        graph = self.graph(graphExec, executable=True)
        self._device.streams.launch(self.stream(stream), graph)

    @returns(0)
    def cudaGraphExecDestroy(self, graphExec: Any) -> None:  # noqa: N802, N803
        self.graph(graphExec, executable=True).alive = False

    @returns(0)
    def cudaGraphDestroy(self, graph: Any) -> None:  # noqa: N802
        self.graph(graph, executable=False).alive = False

    def _new_stream(self, *, blocking: bool) -> Any:
        return self._real.cudaStream_t(self._device.streams.add(next(self._handles), blocking=blocking).handle)

    def _new_event(self, *, timed: bool) -> Any:
        event = Event(next(self._handles), timed)
        self.events[event.handle] = event
        return self._real.cudaEvent_t(event.handle)

    def _new_graph(self, work: list[Work], *, executable: bool = False) -> Graph:
        graph = Graph(next(self._handles), work, executable)
        self.graphs[graph.handle] = graph
        return graph
