"""CUDA streams, copies on them, and CUDA graphs captured from them."""

__all__ = ["Graph", "Stream"]

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from sdxl_trt.engines.backends.cuda.runtime import Cuda, Owned
from sdxl_trt.engines.errors import SdxlTrtError


class Stream(Owned):
    """A stream that does not synchronize with the default stream."""

    destroy = "cudaStreamDestroy"

    def __init__(self, cuda: Cuda) -> None:
        flags = cuda.runtime.cudaStreamNonBlocking
        super().__init__(cuda, cuda.call("cudaStreamCreateWithFlags", flags, doing="creating a CUDA stream"))

    @property
    def handle(self) -> int:
        """The stream handle that TensorRT expects."""
        return int(self.held())

    def upload(self, address: int, source: NDArray[Any], doing: str) -> None:
        """Copy `source`, contiguous and not to be modified before `synchronize`, to device memory at `address`."""
        kind = self.cuda.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(address, source.ctypes.data, source.nbytes, kind, doing)

    def download(self, target: NDArray[Any], address: int, doing: str) -> None:
        """Copy device memory at `address` to `target`, contiguous and not to be read before `synchronize`."""
        kind = self.cuda.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(target.ctypes.data, address, target.nbytes, kind, doing)

    def synchronize(self, doing: str) -> None:
        """Wait for all work on the stream; raise its error, if any."""
        self.cuda.call("cudaStreamSynchronize", self.held(), doing=doing)

    def drain(self, doing: str) -> SdxlTrtError | None:
        """Wait as `synchronize`, but return the error of the stream, or None: for use during error handling.

        The buffers in use on the stream must outlive this call.
        """
        try:
            self.synchronize(doing)
        except SdxlTrtError as exc:
            return exc
        return None

    def launch(self, graph: "Graph", doing: str) -> None:
        """Launch a captured graph on the stream."""
        self.cuda.call("cudaGraphLaunch", graph.executable, self.held(), doing=doing)

    def capture(self, record: Callable[[], None], doing: str) -> "Graph":
        """Capture the work that `record` enqueues, without running it; return the graph, or raise as `record`."""
        # Other threads may allocate meanwhile, which the global mode would forbid.
        mode = self.cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.cuda.call("cudaStreamBeginCapture", self.held(), mode, doing=doing)
        try:
            record()
        except BaseException:
            self._abandon_capture()
            raise
        template = self.cuda.call("cudaStreamEndCapture", self.held(), doing=doing)
        try:
            return Graph(self.cuda, template, doing)
        finally:
            self.cuda.quietly("cudaGraphDestroy", template)

    def _abandon_capture(self) -> None:
        error, template = self.cuda.runtime.cudaStreamEndCapture(self.held())
        if error == self.cuda.runtime.cudaError_t.cudaSuccess:
            self.cuda.quietly("cudaGraphDestroy", template)

    def _copy(self, target: int, source: int, nbytes: int, kind: Any, doing: str) -> None:
        self.cuda.call("cudaMemcpyAsync", target, source, nbytes, kind, self.held(), doing=doing)


class Graph(Owned):
    """An executable CUDA graph for Stream.launch; the memory that it uses must outlive it."""

    destroy = "cudaGraphExecDestroy"

    def __init__(self, cuda: Cuda, template: Any, doing: str) -> None:
        super().__init__(cuda, cuda.call("cudaGraphInstantiate", template, 0, doing=doing))

    @property
    def executable(self) -> Any:
        """The handle that cudaGraphLaunch expects."""
        return self.held()
