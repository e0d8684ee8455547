"""Features of TensorRT for RTX only: a cache of compiled kernels, its own graph capture, parked weights.

UNPROVEN: written against NVIDIA's documentation of tensorrt_rtx 1.7 and never run on a GPU; no other module calls these
functions of the library, and each is checked with hasattr before use.
"""

__all__ = ["KernelCache", "ParkedWeights"]

from typing import Any

from sdxl_trt.engines.backends.cuda import PinnedBuffer
from sdxl_trt.engines.backends.trt.device import TrtDevice
from sdxl_trt.engines.errors import EngineError, SdxlTrtError
from sdxl_trt.engines.host import atomic_write, cache_folder, read_private

_MOST_CACHED = 1 << 30


class KernelCache:
    """Creates the contexts of an engine with a cache that keeps compiled kernels for the next process.

    The file is in the user's cache folder, named by the plan's digest. A cache that other users can write, or that
    TensorRT rejects, is not used: the kernels are compiled again.
    """

    def __init__(self, trt: Any, engine: Any, digest: str) -> None:
        self._config: Any = engine.create_runtime_config() if hasattr(engine, "create_runtime_config") else None
        self._cache: Any = None
        self._file = cache_folder() / "rtx" / f"{digest[:16]}.kernels"
        if self._config is None or not hasattr(self._config, "create_runtime_cache"):
            return
        try:
            self._open(trt)
        except (RuntimeError, TypeError, AttributeError):  # a later API than the one this was written for
            self._cache = None

    def _open(self, trt: Any) -> None:
        self._config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._cache = self._config.create_runtime_cache()
        if content := read_private(self._file, _MOST_CACHED):
            self._cache.deserialize(content)
        self._config.set_runtime_cache(self._cache)
        if hasattr(trt, "CudaGraphStrategy"):
            # TensorRT replaces kernels by better ones at run time: only it knows when to capture.
            self._config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE

    @property
    def usable(self) -> bool:
        """Whether this TensorRT has such a cache; it then captures graphs itself."""
        return self._cache is not None

    def create_context(self, engine: Any) -> Any:
        """Return a new context of `engine` that uses this cache and the caller's memory."""
        return engine.create_execution_context(runtime_config=self._config)

    def save(self) -> None:
        """Write the compiled kernels; failure to write them costs only time."""
        if self._cache is None:
            return
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_write(self._file) as file:
                file.write(memoryview(self._cache.serialize()))
            self._file.chmod(0o600)  # whatever the umask: a file that others can write would not be read
        except (OSError, SdxlTrtError, RuntimeError, TypeError):
            return


class ParkedWeights:
    """Moves the weights of an idle engine to host memory and back, without reading its plan again.

    While the weights are parked, the engine must not run and no context may be created.
    """

    def __init__(self, device: TrtDevice, engine: Any) -> None:
        if not hasattr(engine, "create_weights_manager"):
            raise EngineError("this TensorRT cannot park weights (tensorrt_rtx 1.7 can); use --residency swap")
        self._device = device
        self._manager = engine.create_weights_manager()
        self._host: PinnedBuffer | None = None

    def park(self) -> None:
        """Copy the weights to the host (only once) and free their device memory. Raises ResourceError, EngineError."""
        doing, stream, host = "parking weights", self._device.stream, self._device.trt.TensorLocation.HOST
        with self._device.lock:
            if self._host is None:
                self._host = self._saved(host, doing)
            self._device.ask(doing, self._manager.unload, stream.handle)
            stream.synchronize(doing)

    def _saved(self, location: Any, doing: str) -> PinnedBuffer:
        buffer = PinnedBuffer(self._device.cuda, int(self._manager.get_size()), doing)
        stream = self._device.stream
        try:
            self._device.ask(
                doing, self._manager.save_to_buffer, buffer.address, buffer.nbytes, location, stream.handle
            )
            stream.synchronize(doing)
        except BaseException:
            stream.drain(doing)
            buffer.free()
            raise
        return buffer

    def restore(self) -> None:
        """Copy the weights back to the device. Raises ResourceError, EngineError."""
        if self._host is None:
            return
        doing, stream, host = "restoring weights", self._device.stream, self._device.trt.TensorLocation.HOST
        address, size = self._host.address, self._host.nbytes
        with self._device.lock:
            self._device.ask(doing, self._manager.restore_from_buffer, address, size, host, stream.handle)
            stream.synchronize(doing)

    def free(self) -> None:
        """Free the host memory; parked weights are lost."""
        if self._host is not None:
            self._host.free()
            self._host = None
