"""The peak of the GPU's memory in use, sampled by a thread."""

__all__ = ["MemorySampler", "used_memory"]

import os
import threading
from types import TracebackType
from typing import Self

from sdxl_trt.benchmarks.measure import Nvml
from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.engines.backends.cuda import Cuda

INTERVAL = 0.005
"""Seconds between two samples."""


class _Reader:
    """Reads the bytes in use on the first GPU, by all processes.

    The driver's NVML library is asked if there is one: it makes no CUDA context, which costs hundreds of megabytes, and
    no CUDA call that could disturb a capture in another thread. CUDA is asked otherwise; without both the result is 0.
    With several GPUs, or CUDA_VISIBLE_DEVICES, only CUDA is asked: NVML's first GPU may be another one than CUDA's.
    """

    def __init__(self, nvml: Nvml | None = None) -> None:
        nvml = nvml or Nvml()
        self._nvml = nvml if nvml.devices() == 1 and "CUDA_VISIBLE_DEVICES" not in os.environ else None
        self._cuda: Cuda | None = None

    def __call__(self) -> int:
        used = None if self._nvml is None else self._nvml.used()
        if used is not None:
            return used
        try:
            self._cuda = self._cuda or Cuda()
            free, total = self._cuda.memory()
        except SdxlTrtError:
            return 0
        return total - free


def used_memory() -> int:
    """Return the bytes in use on the first GPU, by all processes."""
    return _Reader()()


class MemorySampler:
    """Samples the memory in use every 5 ms while its context is open.

    `peak` is the largest sample and `before` the first, in bytes; another program's memory counts, too.
    """

    def __init__(self) -> None:
        self._read = _Reader()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory sampler", daemon=True)
        self.before = self.peak = self._read()

    @property
    def grown(self) -> int:
        """Return the bytes by which the peak exceeds the first sample."""
        return self.peak - self.before

    def sample(self) -> None:
        """Take a sample now, in any thread."""
        with self._lock:  # else a late, low sample of one thread would overwrite the peak of another
            self.peak = max(self.peak, self._read())

    def _run(self) -> None:
        while not self._end.wait(INTERVAL):
            self.sample()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
