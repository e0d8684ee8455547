"""The choice of ONNX Runtime's execution provider, its options, and the detection of fallbacks."""

import hashlib
import re
import stat
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest

from sdxl_trt.engines.backends.cuda.driver import Problem
from sdxl_trt.engines.backends.ort import providers as ort_providers
from sdxl_trt.engines.backends.ort.cache import engine_cache
from sdxl_trt.engines.backends.ort.engine import OrtEngine
from sdxl_trt.engines.backends.ort.providers import (
    CPU,
    CUDA,
    RTX,
    TENSORRT,
    ExecutionProvider,
    check_session,
    choose_provider,
    shape_limits,
)
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.bundle.plan_record import BuildFlags, Environment, PlanKey, PlanMemory, PlanRecord
from sdxl_trt.engines.bundle.profile import Profile
from sdxl_trt.engines.errors import CorruptError, IncompatibleError, UsageError
from sdxl_trt.mini.embedded import bundle_path

GRAPHICS = [TENSORRT, CUDA, CPU]


class Session:
    """An InferenceSession that records its arguments and returns a fixed assignment."""

    def __init__(
        self, graph: bytes, options: Any, providers: Any = None, enable_fallback: int = 1, **others: Any
    ) -> None:
        self.graph, self.options, self.providers, self.fallback = graph, options, providers, enable_fallback
        self.others = others

    def get_providers(self) -> list[str]:
        named = [each if isinstance(each, str) else each[0] for each in self.providers or [RTX]]
        return [*named, CPU]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [Part(self.get_providers()[0], ["Conv", "MatMul"]), Part(CPU, ["Shape", "Gather"])]


class Node:
    def __init__(self, op_type: str) -> None:
        self.op_type = op_type


class Part:
    def __init__(self, ep_name: str, operators: list[str]) -> None:
        self.ep_name, self._operators = ep_name, operators

    def get_nodes(self) -> list[Node]:
        return [Node(operator) for operator in self._operators]


class Device:
    def __init__(self, ep_name: str) -> None:
        self.ep_name = ep_name


class Options:
    """SessionOptions that record their calls."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.devices: tuple[list[Device], dict[str, str]] | None = None

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value

    def add_provider_for_devices(self, devices: list[Device], options: dict[str, str]) -> None:
        self.devices = (devices, options)


class Runtime:
    """An `onnxruntime` for GPUs. A test below compares the names of its functions with the real ones."""

    __version__ = "1.31.1"
    SessionOptions = Options
    InferenceSession = Session

    def __init__(self, *available: str, devices: tuple[str, ...] = ()) -> None:
        self.available, self.devices = list(available), [Device(name) for name in devices]
        self.registered: list[tuple[str, str]] = []

    def get_available_providers(self) -> list[str]:
        return self.available

    def register_execution_provider_library(self, name: str, path: str) -> None:
        self.registered.append((name, path))

    def get_ep_devices(self) -> list[Device]:
        return self.devices


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def bundle() -> Bundle:
    return read_bundle(bundle_path())


@pytest.fixture
def without_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_providers, "_has_plugin", lambda: False)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Install a plugin whose library is missing."""
    module = ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    library = tmp_path / "libplugin.so"
    module.get_library_path = lambda: str(library)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(ort_providers, "_has_plugin", lambda: True)
    return library


def test_the_cpu_needs_nothing() -> None:
    assert choose_provider(onnxruntime, "ort-cpu") == ExecutionProvider(CPU, device="cpu")


@pytest.mark.parametrize(
    ("provider", "command"),
    [
        ("ort-cuda", "pip uninstall -y onnxruntime && pip install 'sdxl-trt[gpu]'"),
        ("ort-tensorrt", "make a new environment and run there: pip install 'sdxl-trt[ort-tensorrt]'"),
    ],
)
@pytest.mark.usefixtures("without_plugin")
def test_a_missing_provider_names_the_package(provider: str, command: str) -> None:
    """With the real onnxruntime for CPUs."""
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(IncompatibleError, match=rf"not \w+; {re.escape(command)}$"):
        choose_provider(onnxruntime, provider)


def test_an_available_provider_is_chosen(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    startable = {"CUDAExecutionProvider", "TensorrtExecutionProvider"}
    monkeypatch.setattr(
        ort_providers,
        "provider_problem",
        lambda ort, name: None if name in startable & set(ort.available) else Problem("absent", "install it"),
    )
    assert choose_provider(Runtime(*GRAPHICS), "ort-cuda") == ExecutionProvider(CUDA)
    assert choose_provider(Runtime(*GRAPHICS), "ort-tensorrt") == ExecutionProvider(TENSORRT, profiled=True)
    assert choose_provider(Runtime(CPU), "ort-tensorrt") == ExecutionProvider(RTX, plugin=True, profiled=True)
    with pytest.raises(IncompatibleError):
        choose_provider(Runtime(CPU), "ort-cuda")  # the plugin is not a CUDA provider


def _open(chosen: ExecutionProvider, bundle: Bundle, runtime: Any, graph: bytes = b"") -> Session:
    limits = shape_limits(bundle, "unet") if chosen.profiled else None
    session = chosen.open(runtime, graph, runtime.SessionOptions(), bundle, "unet", limits)
    assert isinstance(session, Session)
    return session


def test_ort_cuda_uses_only_cuda(bundle: Bundle) -> None:
    session = _open(ExecutionProvider(CUDA), bundle, Runtime(*GRAPHICS))
    ((name, options),) = session.providers
    assert name == CUDA
    assert options["use_tf32"] == "0"
    assert session.fallback == 0


def test_tensorrt_gets_shapes_and_a_private_cache(bundle: Bundle, tmp_path: Path) -> None:
    session = _open(ExecutionProvider(TENSORRT, profiled=True), bundle, Runtime(*GRAPHICS))
    (name, options), (second, _) = session.providers
    assert (name, second) == (TENSORRT, CUDA)
    assert session.fallback == 0
    # A model trained on 16 x 16 latents, in multiples of 4; guidance needs two rows.
    assert "sample:1x4x8x8," in options["trt_profile_min_shapes"]
    assert "sample:2x4x16x16," in options["trt_profile_opt_shapes"]
    assert "sample:2x4x16x16," in options["trt_profile_max_shapes"]
    assert "encoder_hidden_states:2x231x112" in options["trt_profile_max_shapes"]
    folder = Path(options["trt_engine_cache_path"])
    assert folder.is_relative_to(tmp_path / "cache")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not [key for key in options if "fp16" in key or "host" in key]


@pytest.mark.parametrize(
    ("version", "disabled"),
    [("1.26.0", ["GemmTransposeFusion"]), ("1.29.0", ["GemmTransposeFusion"]), ("1.30.0", None), ("2.0.0", None)],
)
def test_the_optimizer_with_a_defect_is_off(bundle: Bundle, version: str, disabled: list[str] | None) -> None:
    runtime = Runtime(*GRAPHICS)
    runtime.__version__ = version
    for chosen in (ExecutionProvider(CUDA), ExecutionProvider(CPU, device="cpu")):
        assert _open(chosen, bundle, runtime).others.get("disabled_optimizers") == disabled


def test_the_real_session_takes_the_name_of_the_optimizer(bundle: Bundle) -> None:
    """A session that refused the argument would start on no old version."""
    engine = OrtEngine(bundle, "text_encoder")
    engine.prefetch()
    old = ModuleType("onnxruntime")
    old.__dict__.update(vars(onnxruntime), __version__="1.26.0")
    assert engine._open(old, ExecutionProvider(CPU, device="cpu")).get_providers() == [CPU]


def test_the_plugin_gets_the_first_gpu_and_its_options(bundle: Bundle, plugin: Path) -> None:
    runtime = Runtime(CPU, devices=(CPU, RTX, RTX))
    session = _open(ExecutionProvider(RTX, plugin=True, profiled=True), bundle, runtime)
    assert session.fallback == 0
    devices, options = session.options.devices
    assert devices == [runtime.devices[1]]
    assert runtime.registered == [(RTX, str(plugin))]
    assert "sample:2x4x16x16," in options["nv_profile_opt_shapes"]
    _open(ExecutionProvider(RTX, plugin=True, profiled=True), bundle, runtime)
    assert len(runtime.registered) == 1  # once per process


def test_the_options_of_the_plugin_are_those_of_its_header(bundle: Bundle) -> None:
    found = find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the plugin is not installed")
    header = Path(found.submodule_search_locations[0]) / "tensorrt_rtx_provider_options.h"
    known = set(re.findall(r'constexpr const char\* \w+ = "(\w+)"', header.read_text()))
    settings = ExecutionProvider(RTX, plugin=True)._settings(onnxruntime, bundle, "unet", shape_limits(bundle, "unet"))
    assert set(settings) <= known
    assert "nv_profile_min_shapes" in settings


@pytest.mark.usefixtures("plugin")
def test_a_plugin_without_a_gpu_names_the_supported_ones(bundle: Bundle) -> None:
    with pytest.raises(IncompatibleError, match=r"no GPU that it supports.*8\.9"):
        _open(ExecutionProvider(RTX, plugin=True, profiled=True), bundle, Runtime(CPU, devices=(CPU,)))


@pytest.mark.usefixtures("plugin")
def test_a_plugin_that_does_not_load_is_explained(bundle: Bundle) -> None:
    """With the real ONNX Runtime."""
    with pytest.raises(IncompatibleError, match=r"does not load .*libplugin\.so.*NVIDIA driver"):
        OrtEngine(bundle, "unet", "ort-tensorrt").load()


def test_the_substitute_has_the_real_names() -> None:
    real = onnxruntime.SessionOptions()
    for name in ("add_session_config_entry", "add_provider_for_devices"):
        assert hasattr(real, name)
    for name in ("get_available_providers", "preload_dlls", "register_execution_provider_library", "get_ep_devices"):
        assert hasattr(onnxruntime, name)
    assert {"ep_name", "device"} <= set(dir(onnxruntime.OrtEpDevice))
    assert {"ep_name", "get_nodes"} <= set(dir(onnxruntime.OrtEpAssignedSubgraph))
    assert "op_type" in dir(onnxruntime.OrtEpAssignedNode)


@pytest.fixture
def recorded(bundle: Bundle) -> Any:
    """Return a real session of the text encoder that has recorded its graph assignment."""
    component = bundle.manifest.components["text_encoder"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    weights = bundle.path(component.weights).read_bytes()
    options.add_external_initializers_from_files_in_memory(["weights.data"], [weights], [len(weights)])
    graph = bundle.path(component.graph).read_bytes()
    return onnxruntime.InferenceSession(graph, options, providers=[CPU], enable_fallback=0)


def test_a_session_on_the_right_provider_passes(recorded: Any) -> None:
    check_session(recorded, CPU, "text_encoder")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_the_real_fallback_to_the_cpu_is_refused(bundle: Bundle) -> None:
    """Without CUDA, ONNX Runtime still creates the session, on the CPU, at most with a warning."""
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    engine = OrtEngine(bundle, "text_encoder")
    engine.prefetch()
    with pytest.raises(IncompatibleError, match="could not start CUDAExecutionProvider and would run on the CPU"):
        engine._open(onnxruntime, ExecutionProvider(CUDA))


def test_operators_left_to_the_cpu_are_named(recorded: Any) -> None:
    class Started(Session):
        def get_provider_graph_assignment_info(self) -> list[Any]:
            return [*recorded.get_provider_graph_assignment_info(), Part(CUDA, ["Conv"])]

    with pytest.raises(IncompatibleError, match=r"CUDAExecutionProvider does not run Attention, MatMul,.*--opset 20"):
        check_session(Started(b"", None, [CUDA]), CUDA, "text_encoder")


def test_conversions_of_8_bits_left_to_the_cpu_are_named() -> None:
    class Started(Session):
        def get_provider_graph_assignment_info(self) -> list[Any]:
            return [Part(CUDA, ["Conv"]), Part(CPU, ["Shape", "QuantizeLinear", "DequantizeLinear"])]

    with pytest.raises(IncompatibleError, match=r"does not run DequantizeLinear, QuantizeLinear,.*--opset 20"):
        check_session(Started(b"", None, [CUDA]), CUDA, "unet")


def test_a_session_that_runs_on_its_second_provider_is_refused() -> None:
    class Idle(Session):
        def get_provider_graph_assignment_info(self) -> list[Any]:
            return [Part(CUDA, ["Conv"]), Part(TENSORRT, ["Cast"])]

    with pytest.raises(IncompatibleError, match="TensorrtExecutionProvider does not run everything"):
        check_session(Idle(b"", None, [TENSORRT, CUDA]), TENSORRT, "unet")


def test_a_graph_with_compiled_code_is_refused(bundle: Bundle) -> None:
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="../evil.engine")
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_model(helper.make_graph([node], "g", [value], [out])).SerializeToString()
    with pytest.raises(CorruptError, match="compiled elsewhere"):
        _open(ExecutionProvider(CUDA), bundle, Runtime(*GRAPHICS), graph)


def test_engines_of_other_weights_have_another_folder(bundle: Bundle) -> None:
    """ONNX Runtime identifies engines by the names in the graph, which fine-tunes share."""
    unet = bundle.manifest.components["unet"]
    tuned, redrawn = (
        Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, components={"unet": other}))
        for other in (
            msgspec.structs.replace(unet, weights=msgspec.structs.replace(unet.weights, sha256="0" * 64)),
            msgspec.structs.replace(unet, graph=msgspec.structs.replace(unet.graph, sha256="0" * 64)),
        )
    )
    limits = shape_limits(bundle, "unet")
    folder = engine_cache(bundle, "unet", "ep 1", limits)
    assert engine_cache(bundle, "unet", "ep 1", limits) == folder
    wider = Profile(shapes={**limits.shapes, "timestep": ((1,), (2,), (3,))})
    others = [
        engine_cache(tuned, "unet", "ep 1", limits),
        engine_cache(redrawn, "unet", "ep 1", limits),
        engine_cache(bundle, "unet", "ep 2", limits),
        engine_cache(bundle, "unet", "ep 1", wider),
    ]
    assert len({folder, *others}) == 5


@pytest.mark.parametrize("place", ["sdxl-trt", "sdxl-trt/onnxruntime"])
def test_a_cache_that_others_can_write_is_refused(bundle: Bundle, tmp_path: Path, place: str) -> None:
    limits = shape_limits(bundle, "unet")
    engine_cache(bundle, "unet", "ep", limits)
    (tmp_path / "cache" / place).chmod(0o777)
    with pytest.raises(UsageError, match="other users can write it"):
        engine_cache(bundle, "unet", "ep", limits)


def test_a_cache_that_cannot_be_created_is_a_usage_error(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache" / "inside"))
    with pytest.raises(UsageError, match="making the engine cache"):
        engine_cache(bundle, "unet", "ep", shape_limits(bundle, "unet"))


def test_the_sizes_of_plans_are_used(bundle: Bundle) -> None:
    """Two profiles of a static plan become one that covers both, tuned for guidance."""
    unet = bundle.manifest.components["unet"]
    rows = [Profile(shapes={"timestep": ((n,), (n,), (n,))}) for n in (1, 2)]
    key = PlanKey(
        component="unet", graph=unet.graph.sha256, weights=unet.weights.sha256, profiles=tuple(rows),
        flags=BuildFlags(), environment=Environment(
            flavour="tensorrt", tensorrt="11.4", gpu="g", compute_capability="8.9", driver="d", platform="p"
        ),
    )  # fmt: skip
    digest = hashlib.sha256(b"").hexdigest()
    record = PlanRecord(
        key=key, file=msgspec.structs.replace(unet.graph, sha256=digest), memory=PlanMemory(weights=1, activations=1),
        seconds=1.0,
    )  # fmt: skip
    planned = Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, plans=(record,)))
    assert shape_limits(planned, "unet").shapes == {"timestep": ((1,), (2,), (2,))}
    assert shape_limits(planned, "refiner_unet") == shape_limits(bundle, "refiner_unet")


def test_the_default_sizes_cover_the_inputs_of_a_run(bundle: Bundle) -> None:
    inputs = {"sample": (2, 4, 16, 16), "timestep": (2,), "encoder_hidden_states": (2, 77, 112), "time_ids": (2, 6)}
    assert shape_limits(bundle, "unet").holds(inputs)
    assert np.prod(shape_limits(bundle, "vae_decoder").shapes["latent_sample"][1]) == 4 * 16 * 16
