"""Deserialize a plan while its chunks are still being read and checked, through TensorRT's IStreamReaderV2.

What NVIDIA's Python binding makes of a reader (python/src/infer/pyCore.cpp, and the docstring of IStreamReaderV2):
- It calls ``read(num_bytes, stream)``, which returns a buffer, and calls again until it has `num_bytes`. It copies the
  buffer itself, synchronously, to host or device memory: the reader never sees the destination.
- It holds Python's lock while it copies. So pieces are small: a step of another engine in another thread waits for one
  piece, not for gigabytes.
- An exception in `read`, even an interrupt, is printed and becomes a failed read: the reader keeps it for later.
- Its constructor opens the CUDA driver.

NVIDIA expects no gain for Python over deserializing from memory. That holds for a plan that is in memory already: it is
passed whole, without Python's lock being held. A plan that is still being read is streamed, so that reading, checking
and copying overlap, and the memory of what was copied is given back.
"""

__all__ = ["deserialize", "make_reader"]

import logging
from collections.abc import Callable
from typing import Any

from sdxl_trt.engines.errors import EngineError, SdxlTrtError
from sdxl_trt.engines.plans import PlanReader

PIECE = 4 << 20
"""The most bytes of one read: under a millisecond of copying at PCIe's rates."""
log = logging.getLogger(__name__)

Ask = Callable[..., Any]


def deserialize(trt: Any, runtime: Any, plan: Any, ask: Ask) -> Any:
    """Return the ICudaEngine of `plan`: a buffer, or a PlanReader, which the caller closes.

    `ask(method, *arguments)` calls a TensorRT method and raises an SdxlTrtError if it fails. If a plan in pieces is
    refused for a reason that is not the plan's, it is tried again from memory. Raises CorruptError for a damaged plan,
    and what `ask` raises.
    """
    if not isinstance(plan, PlanReader):
        return ask(runtime.deserialize_cuda_engine, plan)
    # One chunk has nothing to overlap with.
    if plan.pieces == 1 or plan.complete or not hasattr(trt, "IStreamReaderV2"):
        return ask(runtime.deserialize_cuda_engine, plan.whole())
    try:
        reader = make_reader(trt, plan)
    except RuntimeError as exc:
        log.warning("the plan is read whole before it is loaded: TensorRT made no stream reader (%s)", exc)
        return ask(runtime.deserialize_cuda_engine, plan.whole())
    try:
        return ask(runtime.deserialize_cuda_engine, reader)
    except EngineError as exc:
        if reader.failure is None:
            log.warning("the plan is read whole: TensorRT did not take it in pieces (%s)", exc)
    except SdxlTrtError as exc:
        if reader.failure is None:
            raise
        raise reader.failure from exc
    if reader.failure is not None:
        raise reader.failure
    return ask(runtime.deserialize_cuda_engine, plan.whole())


def make_reader(trt: Any, plan: PlanReader) -> Any:
    """Return an IStreamReaderV2 over `plan`; its `failure` is the error that ended a read. Raises RuntimeError."""

    class Reader(trt.IStreamReaderV2):  # type: ignore[misc] # the base is known at run time only
        def __init__(self) -> None:
            trt.IStreamReaderV2.__init__(self)  # the binding requires this call instead of super()
            self.failure: BaseException | None = None
            self._at = 0

        def read(self, num_bytes: int, stream: int) -> memoryview:  # noqa: ARG002 - the binding copies synchronously
            try:
                return self._piece(num_bytes)
            except BaseException as exc:  # noqa: BLE001 - raised by `deserialize`
                self.failure = exc.with_traceback(None)  # its frames would keep the runtime and the engine alive
                return memoryview(b"")

        def _piece(self, most: int) -> memoryview:
            plan.drop(self._at)  # the binding has copied what it was given before
            if self._at >= plan.size:
                return memoryview(b"")
            piece = plan.at(self._at)[: min(most, PIECE)]
            self._at += len(piece)
            return piece

        def seek(self, offset: int, where: Any) -> bool:
            starts = {"SET": 0, "CUR": self._at, "END": plan.size}
            target = starts[where.name] + offset
            if not 0 <= target <= plan.size:
                return False
            self._at = target
            return True

    return Reader()
