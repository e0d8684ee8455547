"""One GPU that TensorRT engines share: a stream, a block of activations, staging memory, and a runtime."""

__all__ = ["TrtDevice", "aligned", "forget_frames", "open_device"]

import contextlib
import functools
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from sdxl_trt.engines.backends.cuda import REMEDY, Cuda, DeviceBuffer, PinnedBuffer, Stream, Usage
from sdxl_trt.engines.backends.trt.api import Messages, make_logger, tensorrt_module
from sdxl_trt.engines.backends.trt.environment import gpu_of
from sdxl_trt.engines.backends.trt.plan_stream import deserialize
from sdxl_trt.engines.bundle import Component, Flavour, computes, computes_bf16, needed_capability
from sdxl_trt.engines.errors import EngineError, IncompatibleError, ResourceError, SdxlTrtError

ALIGNMENT = 256
"""The alignment in bytes that TensorRT requires of device memory."""

# What identifies memory errors in TensorRT's messages; Python sees no error code.
_MEMORY_SIGNS = ("out of memory", "outofmemory", "cudaerrormemoryallocation", "could not be allocated", "bad_alloc")
# What identifies messages about a plan of another version, platform or device.
_FOREIGN_SIGNS = (": serialization (", "incompatible", "not compatible", "expecting library version")


class Activations:
    """One block of device memory that all loaded engines use in turn, as large as the largest needs.

    The caller holds the device's lock: nothing runs in the block while it is replaced.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._needs: dict[object, int] = {}
        self._block: DeviceBuffer | None = None

    @property
    def nbytes(self) -> int:
        """The current size of the block in bytes."""
        return self._block.nbytes if self._block is not None else 0

    def reserve(self, owner: object, nbytes: int) -> None:
        """Keep the block at `nbytes` or more until `owner` calls `release`; a reservation grows and never shrinks.

        Raises ResourceError if the block cannot grow; `owner` then has the reservation that it had before.
        """
        before, wanted = self._needs.get(owner, 0), aligned(max(nbytes, 1))
        if wanted <= before:
            return
        self._needs[owner] = wanted
        try:
            self.block()
        except BaseException:
            if before:
                self._needs[owner] = before
            else:
                del self._needs[owner]
            self._restore()
            raise

    def release(self, owner: object) -> None:
        """Drop the reservation of `owner`; shrink the block if the others need less."""
        self._needs.pop(owner, None)
        if self.nbytes > max(self._needs.values(), default=0):
            self.free()
            self._restore()

    def block(self) -> DeviceBuffer:
        """Return the block; if it is too small, it is reallocated and its address changes."""
        wanted = max(self._needs.values(), default=0)
        if self._block is None or self._block.nbytes < wanted:
            self.free()  # first, so that old and new never exist together
            self._block = DeviceBuffer(self._cuda, wanted, "allocating memory for activations")
        return self._block

    def _restore(self) -> None:
        """Allocate the block for the remaining engines; if that fails, their next call of `block` raises."""
        if self._needs:
            with contextlib.suppress(SdxlTrtError):
                self.block()

    def free(self) -> None:
        """Free the block; the next call of `block` allocates another."""
        if self._block is not None:
            self._block.free()
            self._block = None


class TrtDevice:
    """The GPU resources that TensorRT engines share; a context manager that frees them.

    An engine holds `lock` while it computes, since it then owns the stream, the activations and the staging memory.
    Loading holds it only to reserve activations, so one engine can load while another runs.

    A second lock belongs to `loading` and `capturing`: calls that may synchronize the device break a capture in any
    other thread, whatever the mode of the capture. Calls under `lock` are safe, since a capture holds it; loading
    makes such calls without it, and therefore holds the second lock. The order of the two: a thread that holds `lock`
    never waits for the second one, it only tries it; a thread that holds the second one never waits for `lock`.
    """

    def __init__(self, flavour: Flavour) -> None:
        self.flavour = flavour
        self.trt: Any = tensorrt_module(flavour)
        self.cuda = Cuda()
        if flavour == "tensorrt-rtx":
            _require_ampere(self.cuda)
        self.lock = threading.RLock()
        self.messages = Messages()
        self.stream = Stream(self.cuda)
        self.activations = Activations(self.cuda)
        self._staging: PinnedBuffer | None = None
        self._logger = make_logger(self.trt, self.messages)
        self._runtime: Any = None
        self._loading = threading.Lock()

    def require_kernels(self, components: Mapping[str, Component]) -> None:
        """Raise IncompatibleError for a component, by name, in a precision that this GPU cannot compute.

        A plan for one GPU was refused before it was built; those of TensorRT for RTX are built for every GPU.
        """
        for name, component in components.items():
            if not needed_capability(component.precision):
                continue
            gpu, capability = gpu_of(self.cuda)
            if not computes(component.precision, capability):
                raise IncompatibleError(f"{name} is {component.precision}, which {gpu} (compute capability"
                                        f" {capability}) cannot compute, {needed_capability(component.precision)} is"
                                        " needed; export the bundle again with --fp16")  # fmt: skip

    def deserialize(self, plan: Any, doing: str) -> Any:
        """Return the ICudaEngine of `plan`, a buffer or a PlanReader, which may be dropped afterwards.

        `doing` is for messages. Raises ResourceError, IncompatibleError for a plan of another version or device,
        CorruptError for a damaged one, EngineError.
        """
        with self.loading(doing):  # also because a runtime is not thread-safe
            if self._runtime is None:
                self._runtime = self._new_runtime(doing)
            # engine_host_code_allowed stays False: a plan must not contain host code.
            return deserialize(self.trt, self._runtime, plan, functools.partial(self._ask_for_engine, doing))

    def _ask_for_engine(self, doing: str, method: Callable[..., Any], plan: Any) -> Any:
        """Return what `ask` does; raise IncompatibleError for a plan of another version or device."""
        try:
            return self.ask(doing, method, plan)
        except EngineError as exc:
            if any(sign in str(exc).lower() for sign in _FOREIGN_SIGNS):
                raise IncompatibleError(f"{exc}; build the plan again with export-engines") from exc
            raise

    def _new_runtime(self, doing: str) -> Any:
        try:
            return self.ask(doing, self.trt.Runtime, self._logger)
        except TypeError as exc:  # the binding raises it if the library returns none
            raise self.explain(doing, str(exc)) from exc

    @contextlib.contextmanager
    def loading(self, doing: str) -> Iterator[None]:
        """Keep other threads from capturing, for calls outside `lock` that may synchronize the device.

        Waits for a capture or another load to end. The caller must not hold `lock`, nor take it inside.
        """
        self.cuda.enter(doing)
        with self._loading:
            yield

    @contextlib.contextmanager
    def capturing(self) -> Iterator[bool]:
        """Yield whether the caller, which holds `lock`, may capture now: not while another thread loads.

        Never waits: a load takes seconds, and a step runs without a graph.
        """
        free = self._loading.acquire(blocking=False)
        try:
            yield free
        finally:
            if free:
                self._loading.release()

    @contextlib.contextmanager
    def computing(self, doing: str) -> Iterator[None]:
        """Hold the lock for work on the stream; after an exception, wait until none of the work still runs."""
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
        """Call a TensorRT method and return its result; if it raises or returns None or False, raise `explain`."""
        self.messages.forget()
        try:
            result = method(*arguments)
        except (RuntimeError, MemoryError) as exc:
            raise self.explain(doing, str(exc)) from exc
        if result is None or result is False:
            raise self.explain(doing)
        return result

    def explain(self, doing: str, otherwise: str = "") -> SdxlTrtError:
        """Return the SdxlTrtError for TensorRT's latest messages in this thread; `otherwise` if there are none."""
        errors = self.messages.errors() or ([otherwise] if otherwise else [])
        if any(sign in " ".join(errors).lower() for sign in _MEMORY_SIGNS):
            return ResourceError(f"{doing}: out of memory; {REMEDY}")
        return EngineError(f"{doing}: TensorRT failed: {self.messages.reason(otherwise)}")

    def lost(self, doing: str) -> SdxlTrtError | None:
        """Wait for the stream and return its error, or None: TensorRT itself does not report a lost device."""
        with self.lock:
            return self.stream.drain(doing)

    @property
    def usage(self) -> Usage:
        """The bytes that engines hold in addition to their weights: activations, tensors, pinned memory."""
        return self.cuda.usage

    def staging(self, nbytes: int) -> PinnedBuffer:
        """Return at least `nbytes` of pinned host memory, valid while the caller holds `lock`."""
        if self._staging is None or self._staging.nbytes < nbytes:
            self._free_staging()
            self._staging = PinnedBuffer(
                self.cuda, aligned(max(nbytes, 1)), "allocating host memory for copies to the GPU"
            )
        return self._staging

    def close(self) -> None:
        """Free everything; all engines must be unloaded before. May be called twice."""
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
    """Clear the local variables in the traceback of `exc`, which would keep engines on the device alive."""
    while exc is not None:
        traceback.clear_frames(exc.__traceback__)
        exc = exc.__cause__


def _require_ampere(cuda: Cuda) -> None:
    """Raise IncompatibleError for a GPU that plans of TensorRT for RTX, built for every GPU, leave out.

    NVIDIA documents them for compute capability 8.0 and later; Turing would need plans of its own.
    """
    name, capability = gpu_of(cuda)
    if not computes_bf16(capability):  # both came with Ampere
        raise IncompatibleError(f"{name} has compute capability {capability}, and plans of TensorRT for RTX need 8.0 or"
                                " later; use plans of --engine tensorrt, or --provider ort-cuda")  # fmt: skip


def aligned(nbytes: int) -> int:
    """Return `nbytes` rounded up to a multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def open_device(flavour: Flavour) -> TrtDevice:
    """Return the first visible GPU for TensorRT engines of `flavour`; the caller closes it.

    Raises IncompatibleError if TensorRT, cuda-bindings, the driver or the GPU is missing, or if the GPU is too old for
    plans of `flavour`; ResourceError, EngineError.
    """
    return TrtDevice(flavour)
