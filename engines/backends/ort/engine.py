"""The Engine protocol on ONNX Runtime, on a CPU or a GPU."""

__all__ = ["OrtEngine"]

from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from sdxl_trt.engines.backends.cuda import pip_install
from sdxl_trt.engines.backends.mapped import MappedEngine
from sdxl_trt.engines.backends.ort.products import EXACT_PRODUCTS, saturates
from sdxl_trt.engines.backends.ort.providers import (
    ORT_PROVIDERS,
    ExecutionProvider,
    OrtProvider,
    choose_provider,
    shape_limits,
)
from sdxl_trt.engines.bundle import Bundle, Component, Profile
from sdxl_trt.engines.engine import Array, DeviceArray, Value, check_home, fill_optional, numpy_dtype, whole_feed
from sdxl_trt.engines.errors import EngineError, IncompatibleError, SdxlTrtError, UsageError
from sdxl_trt.engines.host import one_line, return_freed_memory
from sdxl_trt.engines.plans import outside_profiles

# Errors are raised as exceptions; ONNX Runtime would print them beside our one line.
_STOP_SPINNING = "session.force_spinning_stop"
_FATAL_ONLY = 4


class OrtEngine(MappedEngine):
    """One component on ONNX Runtime: on the CPU, on CUDA, or compiled by TensorRT.

    ONNX Runtime receives the graph as bytes and the weights as a map, so a graph cannot refer to another file. On the
    CPU, the component's `cpu_graph` runs if the bundle has one; `standard` selects the graph of all other backends.
    """

    library = "ONNX Runtime"
    _without_loras = "use TensorRT plans built with --lora-rank 128, or export with --fp16"

    def __init__(self, bundle: Bundle, name: str, provider: OrtProvider = "ort-cpu", *, standard: bool = False) -> None:
        if provider not in ORT_PROVIDERS:
            raise UsageError(f"unknown provider {provider!r}; choose {', '.join(ORT_PROVIDERS)}")
        # On another provider, the CPU graph's special operators would fall back to the CPU.
        own = bundle.manifest.components[name].cpu_graph if provider == "ort-cpu" and not standard else None
        super().__init__(bundle, name, own)
        self.provider = provider
        # TensorRT computes in bf16; the other two providers lack kernels for it.
        if self.component.precision == "bf16" and provider != "ort-tensorrt":
            raise IncompatibleError(
                f"{bundle.root}: {name} is bf16, which ONNX Runtime's {provider.removeprefix('ort-').upper()} provider"
                " cannot run; export it again with --fp16 (or --fp32), or run it with TensorRT, or on a CPU with bf16"
                " instructions with --provider openvino"
            )
        self._session: Any = None
        self._device: DeviceTensors | None = None
        self._limits: Profile | None = None
        self._constants: dict[str, Array] = {}

    @property
    def _loaded(self) -> bool:
        return self._session is not None

    def _check_takes_loras(self) -> None:
        super()._check_takes_loras()
        if self.provider == "ort-tensorrt":
            raise IncompatibleError(f"{self.name}: ONNX Runtime's TensorRT compiles the weights into its engines, so it"
                                    " cannot change them by LoRAs; use --provider ort-cuda, or plans with adapter"
                                    " slots: export-engines --engine tensorrt --lora-rank 128")  # fmt: skip

    def load(self) -> None:
        """Create the session; see Engine.load. Raises IncompatibleError if it would not run on the provider."""
        if self._session is not None:
            return
        self.prefetch()
        ort = _onnxruntime(self.provider)
        try:
            with self._explained("loading"):
                chosen = choose_provider(ort, self.provider)
                self._limits = shape_limits(self._bundle, self.name) if chosen.profiled else None
                self._put_loras()
                self._session = self._open(ort, chosen)
        finally:
            self._forget_files()
        return_freed_memory()
        if chosen.device != "cpu":
            self._device = DeviceTensors(ort, self._session, chosen.device)

    def _open(self, ort: Any, chosen: ExecutionProvider) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        _set_for(ort, options, self.component)
        # Planning which outputs share memory takes more than half of the time of making a session on a CPU: 1.6 of the
        # 3.0 s of the 50 M cousin's UNet. Outputs are freed after their last use without a plan too: the same bits,
        # peak of memory and time of a step.
        options.enable_mem_reuse = chosen.device != "cpu"
        # The threads of each session spin for a while after a run, to be quick at the next one. Where sessions take
        # turns, as the full and the shallow UNet do, they would take the processors from the one that runs.
        options.add_session_config_entry(_STOP_SPINNING, "1")
        if self._weights is not None:
            file_name = PurePosixPath(self.component.weights.file).name
            options.add_external_initializers_from_files_in_memory(
                [file_name], [self._weights], [len(self._weights)]
            )  # fmt: skip
        return chosen.open(ort, self._graph or b"", options, self._bundle, self.name, self._limits)

    def reserve(self, nbytes: int) -> None:
        """Do nothing: ONNX Runtime allocates when it runs; see Engine.reserve."""

    def bind(self, constants: Mapping[str, Array]) -> None:
        """Keep the inputs of a phase; see Engine.bind. The first `infer` copies them to a GPU."""
        self._constants = fill_optional(self.component, constants) | dict(constants)
        if self._device is not None:
            self._device.forget()

    def infer(self, inputs: Mapping[str, Value], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run the session; see Engine.infer. Raises SizeError for shapes outside a compiled graph's profile."""
        names = list(outputs if outputs is not None else self.component.results)
        feed = self._feed(inputs)
        if self._device is None and not any(isinstance(value, DeviceArray) for value in feed.values()):
            with self._explained("running"):
                return dict(zip(names, self._session.run(names, feed), strict=True))
        with self._explained("running"):
            return {name: value.numpy() for name, value in self._values(names, feed, inputs).items()}

    def infer_on_device(self, inputs: Mapping[str, Value]) -> dict[str, DeviceArray]:
        """Run the session and keep its outputs as OrtValues; see Engine.infer_on_device."""
        feed = self._feed(inputs)
        with self._explained("running"):
            values = self._values(self.component.results, feed, inputs)
            return {name: self._on_device(name, value) for name, value in values.items()}

    def infer_keeping(
        self, inputs: Mapping[str, Value], kept: Collection[str], outputs: Sequence[str]
    ) -> tuple[dict[str, Array], dict[str, DeviceArray]]:
        """Run the session; see Engine.infer_keeping. Each call has OrtValues of its own, valid while held."""
        feed = self._feed(inputs)
        with self._explained("running"):
            values = self._values(list(dict.fromkeys([*outputs, *kept])), feed, inputs)
            host = {name: values[name].numpy() for name in outputs}
            return host, {name: self._on_device(name, values[name]) for name in kept}

    def _on_device(self, name: str, value: Any) -> DeviceArray:
        """Return an output's OrtValue as a DeviceArray."""
        spec = next(spec for spec in self.component.outputs if spec.name == name)
        return DeviceArray(tuple(value.shape()), np.dtype(numpy_dtype(spec)), value, self._home)

    @property
    def _home(self) -> str:
        """The device that its OrtValues are on, as ONNX Runtime calls it."""
        return "ort-cpu" if self._device is None else f"ort-{self._device.device}"

    def _feed(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        """Return every input of the graph, checked: see `whole_feed`."""
        if self._session is None:
            raise EngineError(f"{self.name}: infer before load; call load() first")
        feed = whole_feed(self.component, self._constants, inputs)
        check_home(self.name, feed, self._home)
        self._check_limits(feed)
        return feed

    def _values(self, names: Sequence[str], feed: Mapping[str, Value], inputs: Mapping[str, Value]) -> dict[str, Any]:
        """Run the session without a copy of `feed`'s values that are on the device; return its OrtValues."""
        if self._device is None:
            return _run_on_host(_onnxruntime(self.provider), self._session, names, feed)
        constants = {name: array for name, array in self._constants.items() if name not in inputs}
        return self._device.run(names, feed, constants)

    def _check_limits(self, feed: Mapping[str, Value]) -> None:
        if self._limits is None:
            return
        shapes = {name: array.shape for name, array in feed.items()}
        if not self._limits.holds(shapes):
            factor = self._bundle.manifest.base.vae.factor
            raise outside_profiles(self.name, self.component, [self._limits], shapes, factor)

    def unload(self) -> None:
        """Free the session; see Engine.unload."""
        loaded = self._session is not None
        self._device = None
        self._session = None
        self._constants = {}
        self._forget_files()
        if loaded:
            return_freed_memory()

    def _explain(self, doing: str, text: str) -> SdxlTrtError:
        return _incompatibility(doing, text) or super()._explain(doing, text)


def _set_for(ort: Any, options: Any, component: Component) -> None:
    """Set what a session of an 8-bit component needs to compute what was exported."""
    if component.precision == "int8" and saturates(ort):
        options.add_session_config_entry(EXACT_PRODUCTS, "1")
    elif component.precision == "fp8":
        # At higher levels, ONNX Runtime fuses Q/DQ nodes into operators that take no float8.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC


def _run_on_host(ort: Any, session: Any, names: Sequence[str], feed: Mapping[str, Value]) -> dict[str, Any]:
    """Run a session of the CPU; its OrtValues share the memory of the arrays in `feed`."""
    arrays = {name: value for name, value in feed.items() if not isinstance(value, DeviceArray)}
    held = {name: np.ascontiguousarray(array) for name, array in arrays.items()}  # until the run has ended
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in held.items()}
    values |= {name: value.handle for name, value in feed.items() if isinstance(value, DeviceArray)}
    return dict(zip(names, session.run_with_ort_values(names, values), strict=True))


class DeviceTensors:
    """The tensors of a session on its device: constants are copied once, other inputs with every run.

    `device` is the device name of ONNX Runtime's OrtValues, "cuda" or "cpu".
    """

    def __init__(self, ort: Any, session: Any, device: str) -> None:
        self.device = device
        self._ort, self._session = ort, session
        self._uploaded: dict[str, Any] = {}

    def forget(self) -> None:
        """Free the constants on the device."""
        self._uploaded = {}

    def run(self, names: Sequence[str], feed: Mapping[str, Value], constants: Mapping[str, Array]) -> dict[str, Any]:
        """Run the session on `feed` and return the outputs `names` as OrtValues on the device.

        `constants` are inputs that stay on the device until `forget`; their slices in `feed` give the number of rows.
        """
        self._upload(constants)
        binding = self._session.io_binding()
        for name, value in feed.items():
            if isinstance(value, DeviceArray):
                binding.bind_ortvalue_input(name, value.handle)
            elif name in constants:
                # The first rows of a tensor are a tensor at the same address.
                address = self._uploaded[name].data_ptr()
                binding.bind_input(name, self.device, 0, value.dtype.type, value.shape, address)
            else:
                binding.bind_cpu_input(name, value)
        for name in names:
            binding.bind_output(name, self.device)
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return dict(zip(names, binding.get_outputs(), strict=True))

    def _upload(self, constants: Mapping[str, Array]) -> None:
        for name in constants.keys() - self._uploaded.keys():
            # A copy: on a CPU the OrtValue shares the array's memory, which its owner may overwrite.
            array = np.array(constants[name], order="C")
            self._uploaded[name] = self._ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)


def _onnxruntime(provider: str) -> Any:
    try:
        import onnxruntime  # noqa: PLC0415 - 0.1 s, and only when an engine is loaded
    except ImportError as exc:
        command = "pip install 'sdxl-trt[cpu]'" if provider == "ort-cpu" else pip_install("gpu")
        raise IncompatibleError(f"provider {provider} needs onnxruntime ({one_line(str(exc))}); {command}") from exc
    return onnxruntime


def _incompatibility(doing: str, text: str) -> IncompatibleError | None:
    """Return the error for a message of ONNX Runtime that another machine or installation has not; None for others."""
    if "engine from cache" in text:
        return IncompatibleError(f"{doing}: an engine that was compiled earlier does not load ({text[:200]}); TensorRT,"
                                 " the driver or the GPU has changed: remove sdxl-trt/onnxruntime from the cache folder"
                                 " (XDG_CACHE_HOME or ~/.cache)")  # fmt: skip
    if "cannot open shared object file" in text:
        return IncompatibleError(f"{doing}: ONNX Runtime misses a library ({text[-200:]}); trt-inspect --doctor says"
                                 " which, and what to install")  # fmt: skip
    return None
