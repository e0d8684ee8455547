"""The device that TensorRT engines share: opening, closing, and calls of TensorRT."""

import pytest

from sdxl_trt.engines.backends.trt.engine import open_device
from sdxl_trt.engines.errors import EngineError, IncompatibleError, ResourceError


def test_a_device_closes_twice_and_opens_again(simulated) -> None:
    device = open_device("tensorrt")
    device.close()
    device.close()
    with open_device("tensorrt"):
        pass


def test_without_tensorrt_there_is_no_device(simulated) -> None:
    with pytest.raises(IncompatibleError, match="pip install"):
        open_device("tensorrt-rtx")


def test_an_old_error_does_not_explain_a_new_failure(device) -> None:
    device.messages("ERROR", "Requested size was 5 bytes: out of memory")
    with pytest.raises(EngineError, match="asking: TensorRT failed: it gave no reason"):
        device.ask("asking", lambda: None)


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (RuntimeError("Error in set\nweights"), EngineError, "asking: TensorRT failed: Error in set weights"),
        (MemoryError("std::bad_alloc"), ResourceError, "asking: out of memory; try --residency"),
    ],
)
def test_an_exception_of_the_binding_is_explained(device, raised: Exception, kind: type, text: str) -> None:
    def fail() -> None:
        raise raised

    with pytest.raises(kind, match=text) as caught:
        device.ask("asking", fail)
    assert caught.value.__cause__ is raised


def test_a_failed_runtime_is_explained(planned, device, monkeypatch) -> None:
    def fail(logger: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(device.trt, "Runtime", fail)
    with pytest.raises(EngineError, match=r"loading unet: TensorRT failed: pybind11::init\(\)"):
        planned.engine("unet", device).load()
