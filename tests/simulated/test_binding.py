"""The stand-ins for TensorRT's classes compared with the real binding: none may offer more than its original."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.benchmarks.full_size.tensorrt_on_cpu import unavailable

RTX = Path(__file__).parent / "tensorrt_rtx_1_7.json"


@pytest.fixture
def trt(simulated: Any) -> Any:
    import tensorrt

    return tensorrt


@pytest.mark.skipif(unavailable() is not None, reason=f"no TensorRT binding: {unavailable()}")
def test_the_specification_matches_the_real_binding(simulated: Any) -> None:
    from simulated.binding import FILE

    script = Path(__file__).parent / "read_binding.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(FILE.read_text(encoding="utf-8")), f"update it with {script}"


@pytest.mark.parametrize("name", sorted(json.loads(RTX.read_text(encoding="utf-8"))["classes"]))
def test_the_binding_of_tensorrt_for_rtx_takes_the_same_calls(simulated: Any, name: str) -> None:
    """So the stand-ins, which know one binding, hold for both; the file was read from the published binding."""
    from simulated.binding import specification

    ours, theirs = (
        specification()["classes"].get(name, {}),
        json.loads(RTX.read_text(encoding="utf-8"))["classes"][name],
    )
    for kind in ("methods", "properties", "members"):
        known = ours.get(kind, {})
        assert {member: theirs.get(kind, {}).get(member) for member in known} == known


def _class(original: str, **body: Any) -> Any:
    from simulated.binding import Bound, BoundMeta

    return BoundMeta("Standin", (Bound,), body, original=original)


@pytest.mark.parametrize(
    ("original", "body", "message"),
    [
        ("ICudaEngine", {"get_binding_name": lambda self, index: ""}, "is not a method of the real binding"),
        ("ICudaEngine", {"num_io_tensors": lambda self: 1}, "is not a method of the real binding"),
        ("ICudaEngine", {"num_bindings": property(lambda self: 1)}, "is not such a property"),
        ("ICudaEngine", {"serialize": property(lambda self: 1)}, "is not such a property"),
        ("ICudaEngine", {"name": property(lambda self: "", lambda self, value: None)}, "is not such a property"),
        ("ICudaEngine", {"get_tensor_name": lambda self, position: ""}, "takes"),
        ("IExecutionContext", {"execute_async_v3": lambda self, stream_handle, event: True}, "takes"),
        ("Runtime", {"deserialize_cuda_engine": lambda self, serialized_engine: None}, "takes"),
        ("IExecutionContext", {"device_memory": property(lambda self: 0)}, "is not such a property"),
        ("Dims", {"MAX_DIM": 8}, "is not an attribute"),
    ],
)
def test_a_stand_in_that_offers_more_cannot_be_defined(
    simulated: Any, original: str, body: dict[str, Any], message: str
) -> None:
    with simulated.violation(message):
        _class(original, **body)


def test_names_that_the_real_module_lacks_are_missing(simulated: Any, trt: Any) -> None:
    for name in ("IBuilder", "RuntimeCache", "IWeightsManager", "float64"):
        with pytest.raises(AttributeError):
            getattr(trt, name)
    with simulated.violation("tensorrt.OnnxParser is not simulated"):
        trt.OnnxParser  # noqa: B018


def test_enumerations_have_the_real_members_and_no_arithmetic(trt: Any) -> None:
    assert (trt.DataType.HALF.value, trt.DataType.INT64.value, trt.TensorIOMode.OUTPUT.value) == (1, 8, 2)
    assert trt.float16 == trt.DataType.HALF != trt.DataType.FLOAT
    assert trt.ILogger.ERROR is trt.ILogger.Severity.ERROR
    assert (trt.DataType.HALF.itemsize, trt.nptype(trt.int64).__name__, trt.volume((2, 3))) == (2, "int64", 6)
    with pytest.raises(AttributeError):
        trt.DataType.FP16  # noqa: B018
    with pytest.raises(TypeError):
        trt.Logger(2)
    with pytest.raises(TypeError):
        trt.TensorIOMode.INPUT | trt.TensorIOMode.OUTPUT


def test_dims_behave_like_the_real_ones(trt: Any) -> None:
    dims = trt.Dims((2, 4))
    assert (tuple(dims), len(dims), dims[1], dims[:1], dims == [2, 4]) == ((2, 4), 2, 4, (2,), True)
    with pytest.raises(TypeError):
        hash(dims)


def test_calls_that_the_real_binding_rejects_raise(simulated: Any, tiny: Any) -> None:
    trt, engine = tiny.trt, tiny.engine()
    refused: list[Any] = [
        trt.ICudaEngine,
        trt.Runtime,
        lambda: trt.Runtime("logger"),
        lambda: trt.Runtime(log=tiny.logger),
        lambda: engine.get_tensor_name("x"),
        lambda: engine.get_tensor_name(0.0),
        lambda: engine.get_tensor_name(0, 1),
        lambda: engine.get_tensor_name(0, extra=1),
        lambda: engine.get_tensor_mode(name=0),
        lambda: engine.get_tensor_profile_shape(0, "x"),
        lambda: engine.create_execution_context(2),
        lambda: tiny.runtime.deserialize_cuda_engine("plan"),
    ]
    for call in refused:
        with pytest.raises(TypeError):
            call()
    for name in ("num_bindings", "device_memory_size", "get_binding_index", "weight_streaming_budget"):
        with pytest.raises(AttributeError):
            getattr(engine, name)
    for name, value in (("name", "x"), ("num_io_tensors", 3), ("anything", 1)):
        with pytest.raises(AttributeError):
            setattr(engine, name, value)
    with simulated.violation("create_engine_inspector is not simulated"):
        engine.create_engine_inspector()
    assert engine.get_tensor_name(index=0) == "x"


def test_a_logger_must_initialize_its_base(simulated: Any, trt: Any) -> None:
    class Lazy(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            self.lines: list[str] = []

    class Good(Lazy):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            super().__init__()

        def log(self, severity: Any, msg: str) -> None:
            self.lines.append(f"{severity.name}: {msg}")

    with pytest.raises(TypeError, match="must be called when overriding __init__"):
        Lazy()
    logger = Good()
    assert trt.Runtime(logger).deserialize_cuda_engine(b"no plan") is None
    assert logger.lines[0].startswith("ERROR: IRuntime::deserializeCudaEngine: Error Code 1: Serialization")


def test_only_one_flavour_is_installed_at_a_time(simulated: Any, trt: Any) -> None:
    assert trt.__version__ == "11.4.0.106"
    with pytest.raises(ImportError):
        import tensorrt_rtx
    simulated.install("tensorrt-rtx")
    import tensorrt_rtx

    assert tensorrt_rtx.__version__.startswith("1.")
    with pytest.raises(ImportError):
        import tensorrt  # noqa: F401
    simulated.remove()
    from cuda.bindings import runtime

    assert not hasattr(runtime, "_real")
