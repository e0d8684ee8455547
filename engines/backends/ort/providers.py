"""ONNX Runtime's execution providers: the one for each of our providers, its options, and a check that it is in use.

If an execution provider cannot start, ONNX Runtime runs the whole session on the CPU and only logs it: a picture
would take an hour. So the assignment of a session is read back, and a fallback is an error.
"""

__all__ = [
    "CPU",
    "ORT_PROVIDERS",
    "ExecutionProvider",
    "OrtProvider",
    "check_session",
    "choose_provider",
    "plugin_devices",
    "shape_limits",
]

import ctypes
import importlib.util
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from sdxl_trt.engines.backends.ort.cache import engine_cache
from sdxl_trt.engines.backends.ort.probe import (
    CUDA,
    GPU_CAPABILITIES,
    RTX,
    TENSORRT,
    plugin_command,
    plugin_problem,
    provider_problem,
)
from sdxl_trt.engines.bundle import Bundle, Profile
from sdxl_trt.engines.errors import CorruptError, IncompatibleError

OrtProvider = Literal["ort-cpu", "ort-cuda", "ort-tensorrt"]
ORT_PROVIDERS: tuple[OrtProvider, ...] = get_args(OrtProvider)
CPU = "CPUExecutionProvider"
RTX_MODULE = "onnxruntime_ep_nv_tensorrt_rtx"

_CUDA_OPTIONS = {
    # By default the arena doubles with every extension, and never shrinks.
    "arena_extend_strategy": "kSameAsRequested",
    # The default tries every algorithm, with the largest workspaces, at every new picture size.
    "cudnn_conv_algo_search": "HEURISTIC",
    # A graph exported in fp32 runs in fp32.
    "use_tf32": "0",
}
_HEAVY = ("Attention", "Conv", "Gemm", "MatMul", "QuantizeLinear", "DequantizeLinear")
"""Parts of the names of the operators that take most of the time, or would have every value copied to the host."""
# Before this version an optimizer treats a transpose that changes nothing as one that does: text_encoder_2 fails, and a
# square weight would give wrong numbers (onnxruntime issue 32228).
_TRANSPOSES_RIGHT = (1, 30)
_WRONG_OPTIMIZER = "GemmTransposeFusion"
# Operator of models that contain, or refer to, an engine compiled elsewhere: code without a digest in the manifest.
_COMPILED = b"EPContext"


@dataclass(frozen=True)
class ExecutionProvider:
    """An execution provider of this ONNX Runtime: its name there, the device of its tensors, whether it is a plugin.

    `profiled` ones compile the graph for a range of shapes and cache the result.
    """

    name: str
    device: str = "cuda"
    plugin: bool = False
    profiled: bool = False

    def open(self, ort: Any, graph: bytes, options: Any, bundle: Bundle, component: str, limits: Profile | None) -> Any:
        """Return an InferenceSession for `graph`; `options` has the weights, `limits` is the profile if profiled.

        Raises CorruptError for a graph that would load compiled code, UsageError for a cache that other users can
        write, IncompatibleError if the session would run elsewhere, and what ONNX Runtime raises.
        """
        mended = _without_wrong_optimizer(ort.__version__)
        if self.device == "cpu":
            return ort.InferenceSession(graph, options, providers=[self.name], **mended)
        if _COMPILED in graph:
            raise CorruptError(f"{bundle.root}: the graph of {component} contains an engine compiled elsewhere, which"
                               " is code; get an intact copy of the bundle")  # fmt: skip
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        settings = self._settings(ort, bundle, component, limits)
        if self.plugin:
            options.add_provider_for_devices(plugin_devices(ort), settings)
            session = ort.InferenceSession(graph, options, enable_fallback=0, **mended)
        else:
            providers = [(self.name, settings), (CUDA, _CUDA_OPTIONS)] if self.profiled else [(self.name, settings)]
            session = ort.InferenceSession(graph, options, providers=providers, enable_fallback=0, **mended)
        check_session(session, self.name, component)
        return session

    def _settings(self, ort: Any, bundle: Bundle, component: str, limits: Profile | None) -> dict[str, str]:
        if limits is None:
            return _CUDA_OPTIONS
        cache_folder = str(engine_cache(bundle, component, f"{self.name} {ort.__version__}", limits))
        prefix = "nv" if self.plugin else "trt"
        shapes = {f"{prefix}_profile_{which}_shapes": _text(limits, i) for i, which in enumerate(("min", "opt", "max"))}
        if self.plugin:
            # Without the last one the weights are copied into a protobuf message, which is limited to 2 GB.
            return {**shapes, "nv_runtime_cache_path": cache_folder, "nv_use_external_data_initializer": "1"}
        return {
            **shapes,
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": cache_folder,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": cache_folder,
            "trt_load_user_initializer": "1",
        }


def choose_provider(ort: Any, provider: OrtProvider) -> ExecutionProvider:
    """Return the execution provider of module `ort` for `provider`; for ort-tensorrt the RTX plugin is second choice.

    Loads the libraries of the provider first, also from pip's packages. Raises IncompatibleError with the remedy if
    none can start here.
    """
    if provider == "ort-cpu":
        return ExecutionProvider(CPU, device="cpu")
    wanted = CUDA if provider == "ort-cuda" else TENSORRT
    problem = provider_problem(ort, wanted)
    if problem is None:
        return ExecutionProvider(wanted, profiled=provider == "ort-tensorrt")
    if provider == "ort-tensorrt" and _has_plugin():
        return ExecutionProvider(RTX, plugin=True, profiled=True)
    raise IncompatibleError(f"provider {provider} cannot start: {problem}")


def _without_wrong_optimizer(version: str) -> dict[str, list[str]]:
    """Return the arguments of InferenceSession that a defect of this version of ONNX Runtime requires."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return {} if (major, minor) >= _TRANSPOSES_RIGHT else {"disabled_optimizers": [_WRONG_OPTIMIZER]}


def check_session(session: Any, name: str, component: str) -> None:
    """Raise IncompatibleError unless `session` runs its heavy operators on the execution provider called `name`.

    The session must have been created with recording of its graph assignment.
    """
    if name not in session.get_providers():
        raise IncompatibleError(
            f"{component}: ONNX Runtime could not start {name} and would run on the CPU instead; check the NVIDIA"
            " driver (nvidia-smi), CUDA and cuDNN, or use --provider ort-cpu"
        )
    assigned: dict[str, set[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        assigned.setdefault(part.ep_name, set()).update(node.op_type for node in part.get_nodes())
    stray = sorted(_heavy(assigned.get(CPU, ())))
    if name != CPU and (stray or not _heavy(assigned.get(name, ()))):
        what = ", ".join(stray) or "everything"
        raise IncompatibleError(f"{component}: {name} does not run {what}, which ONNX Runtime would run elsewhere;"
                                " export the bundle again with --opset 20, or use another --provider")  # fmt: skip


def _heavy(operators: Iterable[str]) -> set[str]:
    return {operator for operator in operators if any(part in operator for part in _HEAVY)}


def _has_plugin() -> bool:
    return importlib.util.find_spec(RTX_MODULE) is not None


@cache
def _register_rtx(ort: Any) -> None:
    """Register the RTX plugin with ONNX Runtime, once per process."""
    try:
        plugin = importlib.import_module(RTX_MODULE)
        library = Path(plugin.get_library_path())
        for runtime in sorted(library.parent.glob("libcudart.so.*")):
            # The wheel contains the CUDA runtime, under a name that its library does not find.
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        ort.register_execution_provider_library(RTX, str(library))
    except Exception as exc:
        # ONNX Runtime puts the loader's words, which name what is missing, behind its own.
        reason = " ".join(str(exc).split()).rpartition("with error: ")[2]
        raise IncompatibleError(
            f"provider ort-tensorrt: the RTX plugin of ONNX Runtime does not load ({reason[:300]}); install all of the"
            f" NVIDIA driver (libnvidia-ml too), or the plugin again: {plugin_command()}"
        ) from exc


def plugin_devices(ort: Any) -> list[Any]:
    """Register the RTX plugin with module `ort` and return its first device, an OrtEpDevice, in a list.

    Raises IncompatibleError if the plugin does not load or supports no GPU of this machine.
    """
    problem = plugin_problem()
    if problem is not None:
        raise IncompatibleError(f"provider ort-tensorrt cannot start: {problem}")
    _register_rtx(ort)
    devices = [device for device in ort.get_ep_devices() if device.ep_name == RTX]
    if not devices:
        raise IncompatibleError(
            "provider ort-tensorrt: the RTX plugin of ONNX Runtime finds no GPU that it supports (compute capability"
            f" {GPU_CAPABILITIES}); use --provider tensorrt, ort-cuda or ort-cpu"
        )
    return devices[:1]


def shape_limits(bundle: Bundle, name: str) -> Profile:
    """Return the one profile to compile component `name` with: that of its plans, else of the bundle's sizes."""
    from sdxl_trt.engines.plans import profiles_of, stage_sizes  # noqa: PLC0415 - the CPU provider needs no plans

    manifest = bundle.manifest
    for record in manifest.plans:
        if record.key.component == name and not record.for_loras:
            return _span(record.key.profiles)
    return _span(profiles_of(manifest.components[name], stage_sizes(manifest), manifest.base.vae.factor))


def _span(profiles: tuple[Profile, ...]) -> Profile:
    """Return the profile that covers all of `profiles`, tuned for the usual shapes of the largest."""
    largest = max(profiles, key=lambda profile: sum(math.prod(usual) for _, usual, _ in profile.shapes.values())).shapes
    return Profile(
        shapes={
            name: (
                tuple(min(sizes) for sizes in zip(*(each.shapes[name][0] for each in profiles), strict=True)),
                largest[name][1],
                tuple(max(sizes) for sizes in zip(*(each.shapes[name][2] for each in profiles), strict=True)),
            )
            for name in largest
        }
    )


def _text(limits: Profile, which: int) -> str:
    """Return the shapes of a profile as an option value of both TensorRT providers."""
    return ",".join(f"{name}:{'x'.join(map(str, shapes[which]))}" for name, shapes in limits.shapes.items())
