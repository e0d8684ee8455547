"""Features of TensorRT for RTX only: a cache of compiled kernels, and its own graph capture.

UNPROVEN: the calls are compared with the published binding of tensorrt_rtx 1.7, and were never run on a GPU. No other
module calls these functions of the library, and each is checked with hasattr before use. Captures that TensorRT makes
itself are not synchronized with loads of other engines.
"""

__all__ = ["KernelCache"]

from pathlib import Path
from typing import Any

from sdxl_trt.engines.errors import SdxlTrtError
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
        self._file = _cache_file(digest)
        if self._config is None or not hasattr(self._config, "create_runtime_cache"):
            return
        try:
            self._open(trt)
        except (RuntimeError, TypeError, AttributeError):  # a later API than the one this was written for
            self._cache = None

    def _open(self, trt: Any) -> None:
        self._config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._cache = self._config.create_runtime_cache()
        if self._file is not None and (content := read_private(self._file, _MOST_CACHED)):
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
        if self._cache is None or self._file is None:
            return
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_write(self._file) as file:
                file.write(memoryview(self._cache.serialize()))
            self._file.chmod(0o600)  # whatever the umask: a file that others can write would not be read
        except (OSError, SdxlTrtError, RuntimeError, TypeError):
            return


def _cache_file(digest: str) -> Path | None:
    """Return the file for the compiled kernels of a plan; None for a user without a home, who has no cache folder."""
    try:
        return cache_folder() / "rtx" / f"{digest[:16]}.kernels"
    except RuntimeError:
        return None
