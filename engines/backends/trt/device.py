"""One GPU as TensorRT engines share it: a stream, one block for activations, one for copies, one runtime."""

__all__ = ["ALIGNMENT", "Activations", "TrtDevice", "aligned", "forget_frames", "open_device"]

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

from sdxl_trt.engines.backends.cuda import REMEDY, Cuda, DeviceBuffer, PinnedBuffer, Stream, Usage
from sdxl_trt.engines.backends.trt.api import Messages, make_logger, tensorrt_module
from sdxl_trt.engines.bundle import Flavour
from sdxl_trt.engines.errors import EngineError, IncompatibleError, ResourceError, SdxlTrtError

ALIGNMENT = 256
"""Bytes that TensorRT wants device memory aligned to."""

# How TensorRT's messages tell memory apart from other failures; it has no code for it that Python could see.
_MEMORY_SIGNS = ("out of memory", "outofmemory", "cudaerrormemoryallocation", "could not be allocated", "bad_alloc")
# What it says of a plan of another version, platform or device.
_FOREIGN_SIGNS = (": serialization (", "incompatible", "not compatible", "expecting library version")


class Activations:
    """One block of device memory that all loaded engines compute in, one at a time; as large as the neediest asks.

    Whoever calls holds the device's lock: nothing runs in the block while it is replaced.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._needs: dict[object, int] = {}
        self._block: DeviceBuffer | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of the block now."""
        return self._block.nbytes if self._block is not None else 0

    def reserve(self, owner: object, nbytes: int) -> None:
        """Let the block have `nbytes` at least until `owner` calls `release`; ResourceError where it cannot."""
        self._needs[owner] = aligned(max(nbytes, 1))
        try:
            self.block()
        except BaseException:
            del self._needs[owner]
            self._restore()
            raise

    def release(self, owner: object) -> None:
        """Forget what `owner` needed; a block that is larger than the others need is exchanged for a smaller one."""
        self._needs.pop(owner, None)
        if self.nbytes > max(self._needs.values(), default=0):
            self.free()
            self._restore()

    def block(self) -> DeviceBuffer:
        """Return the block, allocated anew where it is too small. Its address changes then."""
        wanted = max(self._needs.values(), default=0)
        if self._block is None or self._block.nbytes < wanted:
            self.free()  # first, so that old and new never lie side by side
            self._block = DeviceBuffer(self._cuda, wanted, "allocating memory for activations")
        return self._block

    def _restore(self) -> None:
        """Let the other engines have their memory while it is still free; if it is not, `block` will tell them."""
        if self._needs:
            with contextlib.suppress(SdxlTrtError):
                self.block()

    def free(self) -> None:
        """Give the block back; the next `block` allocates another."""
        if self._block is not None:
            self._block.free()
            self._block = None


class TrtDevice:
    """What the TensorRT engines of a pipeline share; a context manager that frees it.

    `lock` is held while an engine computes: the stream, the activations and the staging memory are one engine's at
    a time. Loading takes it only to reserve activations, so that one engine loads while another runs.
    """

    def __init__(self, flavour: Flavour) -> None:
        self.flavour = flavour
        self.trt: Any = tensorrt_module(flavour)
        self.cuda = Cuda()
        self.lock = threading.RLock()
        self.messages = Messages()
        self.stream = Stream(self.cuda)
        self.activations = Activations(self.cuda)
        self._staging: PinnedBuffer | None = None
        self._logger = make_logger(self.trt, self.messages)
        self._runtime: Any = None
        self._loading = threading.Lock()

    def deserialize(self, plan: Any, doing: str) -> Any:
        """Return the ICudaEngine in the bytes `plan`, which may be dropped then; `doing` is for messages.

        Raises ResourceError, IncompatibleError for a plan of another version or device, EngineError.
        """
        self.cuda.enter(doing)
        with self._loading:  # a runtime is for one thread at a time
            if self._runtime is None:
                self._runtime = self._new_runtime(doing)
            # engine_host_code_allowed stays False: a plan has no business bringing host code.
            try:
                return self.ask(doing, self._runtime.deserialize_cuda_engine, plan)
            except EngineError as exc:
                if any(sign in str(exc).lower() for sign in _FOREIGN_SIGNS):
                    raise IncompatibleError(f"{exc}; build the plan again with export-engines") from exc
                raise

    def _new_runtime(self, doing: str) -> Any:
        try:
            return self.ask(doing, self.trt.Runtime, self._logger)
        except TypeError as exc:  # how the binding says that the library made none
            raise self.explain(doing, str(exc)) from exc

    @contextlib.contextmanager
    def computing(self, doing: str) -> Iterator[None]:
        """Hold the device for some work on the stream; nothing of it still runs afterwards, whatever happens."""
        with self.lock:
            self.cuda.enter(doing)
            try:
                yield
            except Exception as exc:
                forget_frames(exc)
                lost = self.lost(doing)
                if lost is not None:
                    raise lost from exc
                raise
            except BaseException:
                self.stream.drain(doing)
                raise

    def ask(self, doing: str, method: Callable[..., Any], *arguments: Any) -> Any:
        """Call a method of TensorRT's; where it raises, or returns None or False, raise what TensorRT says of it."""
        self.messages.forget()
        try:
            result = method(*arguments)
        except (RuntimeError, MemoryError) as exc:
            raise self.explain(doing, str(exc)) from exc
        if result is None or result is False:
            raise self.explain(doing)
        return result

    def explain(self, doing: str, otherwise: str = "") -> SdxlTrtError:
        """Return the failure that TensorRT has just told of in this thread as one of ours."""
        errors = self.messages.errors() or ([otherwise] if otherwise else [])
        if any(sign in " ".join(errors).lower() for sign in _MEMORY_SIGNS):
            return ResourceError(f"{doing}: out of memory; {REMEDY}")
        return EngineError(f"{doing}: TensorRT failed: {self.messages.reason(otherwise)}")

    def lost(self, doing: str) -> SdxlTrtError | None:
        """Wait for the stream; return what went wrong on it, since TensorRT does not say that the device is lost."""
        with self.lock:
            return self.stream.drain(doing)

    @property
    def usage(self) -> Usage:
        """The bytes that engines hold besides their weights: activations, tensors, pinned memory."""
        return self.cuda.usage

    def staging(self, nbytes: int) -> PinnedBuffer:
        """Return pinned host memory of `nbytes` at least, for the caller while it holds `lock`."""
        if self._staging is None or self._staging.nbytes < nbytes:
            self._free_staging()
            self._staging = PinnedBuffer(
                self.cuda, aligned(max(nbytes, 1)), "allocating host memory for copies to the GPU"
            )
        return self._staging

    def close(self) -> None:
        """Free everything; engines that are still loaded are to be unloaded first. May be called twice."""
        with self.lock:
            self.activations.free()
            self._free_staging()
            self._runtime = None
            self.stream.free()

    def _free_staging(self) -> None:
        if self._staging is not None:
            self._staging.free()
            self._staging = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def forget_frames(exc: BaseException | None) -> None:
    """Clear the local variables in the traceback of `exc`: whoever keeps the error would keep engines on the device."""
    while exc is not None:
        traceback.clear_frames(exc.__traceback__)
        exc = exc.__cause__


def aligned(nbytes: int) -> int:
    """Return `nbytes` rounded up to a multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def open_device(flavour: Flavour) -> TrtDevice:
    """Return the first visible GPU for TensorRT engines of `flavour`; close it after use.

    Raises IncompatibleError where TensorRT, cuda-bindings, the driver or the GPU is missing, ResourceError,
    EngineError.
    """
    return TrtDevice(flavour)
