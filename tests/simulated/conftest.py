"""A graph of four nodes with a simulated plan, and helpers to run it step by step."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from sdxl_trt.engines.bundle.manifest import TensorSpec
from sdxl_trt.engines.bundle.plan_record import Environment
from sdxl_trt.engines.bundle.profile import Profile

INPUTS = (
    TensorSpec(name="x", dtype="float32", shape=("rows", 4, "height")),
    TensorSpec(name="t", dtype="float32", shape=("rows",)),
)
OUTPUTS = (TensorSpec(name="y", dtype="float32", shape=("rows", 4, "2*height")),)
WEIGHTS = np.arange(4, dtype=np.float32).reshape(4, 1)
ACTIVATIONS = (1024, 4096)
X = np.random.default_rng(3).standard_normal((2, 4, 8)).astype(np.float32)
T = np.array([0.5, 2], np.float32)


def expected(x: NDArray[Any], t: NDArray[Any]) -> NDArray[Any]:
    """Return the output of the graph, computed by numpy."""
    once = x * WEIGHTS + t[:, None, None]
    return np.concatenate([once, once], axis=2)


def _write_graph(folder: Path) -> tuple[Path, Path]:
    weights = folder / "weights.bin"
    weights.write_bytes(WEIGHTS.tobytes())
    initializer = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=WEIGHTS.shape)
    initializer.data_location = TensorProto.EXTERNAL
    for key, value in (("location", weights.name), ("offset", "0"), ("length", str(WEIGHTS.nbytes))):
        initializer.external_data.add(key=key, value=value)
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2])
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["xw"]),
        helper.make_node("Unsqueeze", ["t", "axes"], ["t3"]),
        helper.make_node("Add", ["xw", "t3"], ["once"]),
        helper.make_node("Concat", ["once", "once"], ["y"], axis=2),
    ]
    values = {spec.name: helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape)
              for spec in (*INPUTS, *OUTPUTS)}  # fmt: skip
    graph = helper.make_graph(nodes, "tiny", [values["x"], values["t"]], [values["y"]], [initializer, axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path, weights


class Tiny:
    """A plan with two profiles (1 and 2 rows), and a method for every step of a run on CUDA and TensorRT."""

    def __init__(self, device: Any, folder: Path) -> None:
        import tensorrt as trt
        from cuda.bindings import runtime

        from simulated.plans import Plan, encode

        graph, weights = _write_graph(folder)
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (graph, weights)]
        device.sources["".join(digests)] = (graph, weights)
        self.profiles = tuple(
            Profile(shapes={"x": ((rows, 4, 1), (rows, 4, 8), (rows, 4, 16)), "t": ((rows,),) * 3}) for rows in (1, 2)
        )
        environment = Environment(
            flavour="tensorrt", tensorrt="11.4.0.106", gpu="Simulated GPU", compute_capability="8.9", driver="1",
            platform="linux-x86_64",
        )  # fmt: skip
        self.plan = Plan(
            component="tiny", graph=digests[0], weights=digests[1], inputs=INPUTS, outputs=OUTPUTS,
            profiles=self.profiles, activations=ACTIVATIONS, weights_bytes=1 << 20, streamable=0,
            environment=environment,
        )  # fmt: skip
        self.encode = encode
        self.device, self.trt, self.cuda = device, trt, runtime
        self.kinds = runtime.cudaMemcpyKind
        self.logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
        self.runtime = trt.Runtime(self.logger)

    def engine(self, **changes: Any) -> Any:
        """Return a new engine of the plan, with some fields changed."""
        import msgspec

        return self.runtime.deserialize_cuda_engine(self.encode(msgspec.structs.replace(self.plan, **changes)))

    def ok(self, result: tuple[Any, ...]) -> Any:
        """Assert that a CUDA call succeeded and return its value."""
        error, *values = result
        assert error == self.cuda.cudaError_t.cudaSuccess, error
        return values[0] if values else None

    def pinned(self, array: NDArray[Any]) -> tuple[int, NDArray[Any]]:
        """Return the address of a pinned buffer with a copy of `array`, and a view of it."""
        import ctypes

        pointer = self.ok(self.cuda.cudaMallocHost(array.nbytes))
        view = np.ctypeslib.as_array((ctypes.c_ubyte * array.nbytes).from_address(pointer))
        view = view.view(array.dtype).reshape(array.shape)
        view[...] = array
        return pointer, view

    def stream(self) -> Any:
        """Return a new stream that does not synchronize with the default stream."""
        return self.ok(self.cuda.cudaStreamCreateWithFlags(self.cuda.cudaStreamNonBlocking))

    def context(self, engine: Any, rows: int = 1, height: int = 8, **sizes: int) -> Any:
        """Return a context with shapes and addresses set; `self.buffers` has the sizes, `self.places` the addresses."""
        context = engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self.buffers = {
            "x": rows * 4 * height * 4, "t": rows * 4, "y": rows * 8 * height * 4, "scratch": ACTIVATIONS[rows - 1],
        } | sizes  # fmt: skip
        self.places = {name: self.ok(self.cuda.cudaMalloc(size)) for name, size in self.buffers.items()}
        if rows == 2:
            context.set_optimization_profile_async(1, 0)
            self.cuda.cudaDeviceSynchronize()
        assert context.set_input_shape("x", (rows, 4, height))
        assert context.set_input_shape("t", (rows,))
        for name in ("x", "t", "y"):
            assert context.set_tensor_address(name, self.places[name])
        context.set_device_memory(self.places["scratch"], self.buffers["scratch"])
        return context


@pytest.fixture
def tiny(simulated: Any, tmp_path: Path) -> Iterator[Tiny]:
    """Return the tiny plan on the simulated device."""
    tiny = Tiny(simulated, tmp_path)
    yield tiny
    tiny.runtime = None


class Run:
    """The tiny plan on a stream, with pinned buffers for the inputs `x` and `t` and the output."""

    expected = staticmethod(expected)

    def __init__(self, tiny: Tiny, rows: int = 1, **sizes: int) -> None:
        self.tiny, self.stream, self.rows = tiny, tiny.stream(), rows
        self.x, self.t = X[:rows], T[:rows]
        self.engine = tiny.engine()
        self.context = tiny.context(self.engine, rows, **sizes)
        self.places = tiny.places
        self.hosts = {name: tiny.pinned(array) for name, array in (("x", self.x), ("t", self.t))}
        self.hosts["y"] = tiny.pinned(np.zeros((rows, 4, 16), np.float32))

    def send(self) -> None:
        kind = self.tiny.kinds.cudaMemcpyHostToDevice
        for name in ("x", "t"):
            pointer, view = self.hosts[name]
            self.tiny.ok(self.tiny.cuda.cudaMemcpyAsync(self.places[name], pointer, view.nbytes, kind, self.stream))

    def receive(self) -> Any:
        pointer, view = self.hosts["y"]
        kind = self.tiny.kinds.cudaMemcpyDeviceToHost
        self.tiny.ok(self.tiny.cuda.cudaMemcpyAsync(pointer, self.places["y"], view.nbytes, kind, self.stream))
        return view

    def execute(self) -> bool:
        return bool(self.context.execute_async_v3(int(self.stream)))

    def wait(self) -> None:
        self.tiny.ok(self.tiny.cuda.cudaStreamSynchronize(self.stream))


@pytest.fixture
def make_run(tiny: Tiny) -> Callable[..., Run]:
    """Return a function that makes a Run of the tiny plan, from a number of rows and sizes of buffers."""
    return lambda *arguments, **sizes: Run(tiny, *arguments, **sizes)


@pytest.fixture
def run(tiny: Tiny) -> Run:
    return Run(tiny)


@pytest.fixture
def lenient(simulated: Any) -> None:
    """Let a test leave broken state on purpose; leaks have their own test."""
    simulated.leaks_matter = False


@pytest.fixture(scope="session")
def elsewhere() -> Callable[[Callable[[], Any]], Any]:
    """Return a function that returns the result of a call in another thread."""

    def called(call: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(call).result()

    return called
