"""What only TensorRT for RTX has: a cache of compiled kernels, graphs of its own, weights that can be parked.

UNPROVEN: written against NVIDIA's documentation of tensorrt_rtx 1.7 and run on no GPU; nothing else calls these
functions, and every one of them is asked for with hasattr before it is used.
"""

__all__ = ["KernelCache", "ParkedWeights"]

import os
import stat
from pathlib import Path
from typing import Any

from sdxl_trt.engines.backends.cuda import PinnedBuffer
from sdxl_trt.engines.backends.trt.device import TrtDevice
from sdxl_trt.engines.errors import EngineError, SdxlTrtError
from sdxl_trt.engines.host import atomic_write

_MOST_CACHED = 1 << 30


class KernelCache:
    """Makes the contexts of an engine so that kernels compiled on this GPU are kept for the next process.

    The file lies in the user's cache folder under the plan's digest. A cache that others could write, or that
    TensorRT does not take, is left alone: it costs compiling again, no more.
    """

    def __init__(self, trt: Any, engine: Any, digest: str) -> None:
        self._config: Any = engine.create_runtime_config() if hasattr(engine, "create_runtime_config") else None
        self._cache: Any = None
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self._file = Path(root) / "sdxl-trt" / "rtx" / f"{digest[:16]}.kernels"
        if self._config is None or not hasattr(self._config, "create_runtime_cache"):
            return
        try:
            self._open(trt)
        except (RuntimeError, TypeError, AttributeError):  # its API is younger than our knowledge of it
            self._cache = None

    def _open(self, trt: Any) -> None:
        self._config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._cache = self._config.create_runtime_cache()
        if content := _read_private(self._file):
            self._cache.deserialize(content)
        self._config.set_runtime_cache(self._cache)
        if hasattr(trt, "CudaGraphStrategy"):
            # Kernels are exchanged for better ones while it runs: only TensorRT knows when to capture.
            self._config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE

    @property
    def usable(self) -> bool:
        """Whether this TensorRT has such a cache; it then captures graphs by itself."""
        return self._cache is not None

    def create_context(self, engine: Any) -> Any:
        """Return a new context of `engine` with memory of the caller's and this cache."""
        return engine.create_execution_context(runtime_config=self._config)

    def save(self) -> None:
        """Write what was compiled; a folder that cannot be written costs time only."""
        if self._cache is None:
            return
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_write(self._file) as file:
                file.write(memoryview(self._cache.serialize()))
            self._file.chmod(0o600)  # whatever the umask: others' kernels would be left alone
        except (OSError, SdxlTrtError, RuntimeError, TypeError):
            return


class ParkedWeights:
    """Moves the weights of an idle engine to host memory and back, without reading its plan again.

    The engine must not run, nor contexts of it be made, while its weights are parked. `free` ends it.
    """

    def __init__(self, device: TrtDevice, engine: Any) -> None:
        if not hasattr(engine, "create_weights_manager"):
            raise EngineError("this TensorRT cannot park weights (it takes tensorrt_rtx 1.7); use --residency swap")
        self._device = device
        self._manager = engine.create_weights_manager()
        self._host: PinnedBuffer | None = None

    def park(self) -> None:
        """Copy the weights to the host, once, and give their device memory back. Raises ResourceError, EngineError."""
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
        """Give the host memory back; parked weights are lost."""
        if self._host is not None:
            self._host.free()
            self._host = None


def _read_private(file: Path) -> bytes:
    """Return the bytes of a file that only this user can have written; b"" where it is absent or others could."""
    try:
        status = file.stat()
        private = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        return file.read_bytes() if private and status.st_size <= _MOST_CACHED else b""
    except OSError:
        return b""
