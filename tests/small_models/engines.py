"""Engines for tests of what all of them have in common."""

from sdxl_trt.engines.backends.ort.engine import DeviceTensors, OrtEngine


class OnDevice(OrtEngine):
    """The code path of a GPU with the CPU as the device: ONNX Runtime's own memory, bindings and copies."""

    def load(self) -> None:
        """Load, and keep tensors on the device."""
        super().load()
        import onnxruntime

        self._device = self._device or DeviceTensors(onnxruntime, self._session, "cpu")
