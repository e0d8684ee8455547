"""The Engine protocol on ONNX Runtime, on a CPU or a GPU."""

__all__ = ["OrtEngine"]

import contextlib
import mmap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from sdxl_trt.engines.adapters import ScaledLora
from sdxl_trt.engines.backends.cuda import pip_install
from sdxl_trt.engines.backends.ort.products import EXACT_PRODUCTS, saturates
from sdxl_trt.engines.backends.ort.providers import (
    ORT_PROVIDERS,
    ExecutionProvider,
    OrtProvider,
    choose_provider,
    shape_limits,
)
from sdxl_trt.engines.backends.patched import Patch, plan_patch
from sdxl_trt.engines.bundle import Bundle, Component, Profile, verify_file
from sdxl_trt.engines.engine import (
    Array,
    DeviceArray,
    Value,
    check_inputs,
    fill_optional,
    numpy_dtype,
    rows_of,
    with_rows,
)
from sdxl_trt.engines.errors import (
    EngineError,
    IncompatibleError,
    ResourceError,
    SdxlTrtError,
    UsageError,
    explain_os_error,
)
from sdxl_trt.engines.host import one_line, return_freed_memory
from sdxl_trt.engines.plans import outside_profiles

# Errors are raised as exceptions; ONNX Runtime would print them beside our one line.
_FATAL_ONLY = 4


class OrtEngine:
    """One component on ONNX Runtime: on the CPU, on CUDA, or compiled by TensorRT.

    ONNX Runtime receives the graph as bytes and the weights as a memory map of the one file with the manifest's
    digest: it opens no file itself, so a graph cannot refer to another one. On the CPU, the component's `cpu_graph`
    runs if the bundle has one; `standard` selects the graph of all other backends. With LoRAs, the map is a private
    copy of the pages that they change; an 8-bit component takes none.
    """

    def __init__(self, bundle: Bundle, name: str, provider: OrtProvider = "ort-cpu", *, standard: bool = False) -> None:
        if provider not in ORT_PROVIDERS:
            raise UsageError(f"unknown provider {provider!r}; choose {', '.join(ORT_PROVIDERS)}")
        self.name = name
        self.provider = provider
        self.component: Component = bundle.manifest.components[name]
        if not bundle.manifest.onnx:
            raise IncompatibleError(f"{bundle.root}: contains only plans, and ONNX Runtime runs graphs; export the"
                                    " bundle again without --plans-only, or use --provider tensorrt")  # fmt: skip
        # TensorRT computes in bf16; the other two providers lack kernels for it.
        if self.component.precision == "bf16" and provider != "ort-tensorrt":
            raise IncompatibleError(
                f"{bundle.root}: {name} is bf16, which ONNX Runtime's {provider.removeprefix('ort-').upper()} provider"
                " cannot run; export it again with --fp16 (or --fp32), or run it with TensorRT"
            )
        self._bundle = bundle
        # On another provider, the CPU graph's special operators would fall back to the CPU.
        own = self.component.cpu_graph if provider == "ort-cpu" and not standard else None
        self._graph_record = own or self.component.graph
        self._graph_path = bundle.path(self._graph_record)
        self._weights_path = bundle.path(self.component.weights)
        self._loras: tuple[ScaledLora, ...] = ()
        self._patch: Patch | None = None
        self._graph: bytes | None = None
        self._weights: mmap.mmap | None = None
        self._session: Any = None
        self._device: DeviceTensors | None = None
        self._limits: Profile | None = None
        self._constants: dict[str, Array] = {}

    def adapt(self, loras: Sequence[ScaledLora]) -> None:
        """Set the LoRAs of the next `load`; see Engine.adapt. Other ones than before unload the engine."""
        wanted = tuple(loras)
        if wanted == self._loras:
            return
        if wanted and self.component.eight_bit:
            raise IncompatibleError(
                f"{self.name} is {self.component.precision}, and LoRAs cannot change 8-bit weights on ONNX Runtime;"
                f" fuse them at export (export-engines --lora FILE --{self.component.precision}), use TensorRT plans"
                " built with --lora-rank 128, or export with --fp16"
            )
        if wanted and self.provider == "ort-tensorrt":
            raise IncompatibleError(f"{self.name}: ONNX Runtime's TensorRT compiles the weights into its engines, so it"
                                    " cannot change them by LoRAs; use --provider ort-cuda, or plans with adapter"
                                    " slots: export-engines --engine tensorrt --lora-rank 128")  # fmt: skip
        patch = plan_patch(self._bundle, self.name, wanted) if wanted else None
        self.unload()
        self._loras, self._patch = wanted, patch

    def prefetch(self) -> None:
        """Map the files and check their digests; see Engine.prefetch."""
        if self._graph is not None or self._session is not None:
            return
        verify_file(self._graph_path, self._graph_record)
        verify_file(self._weights_path, self.component.weights)
        try:
            graph = self._graph_path.read_bytes()
            with self._weights_path.open("rb") as file:
                access = mmap.ACCESS_READ if self._patch is None else mmap.ACCESS_COPY
                self._weights = mmap.mmap(file.fileno(), 0, access=access)
        except (OSError, ValueError) as exc:
            reason = exc if isinstance(exc, OSError) else OSError(str(exc))
            raise explain_os_error(reason, f"reading component {self.name}") from exc
        self._graph = graph

    def load(self) -> None:
        """Create the session; see Engine.load. Raises IncompatibleError if it would not run on the provider."""
        if self._session is not None:
            return
        self.prefetch()
        ort = _onnxruntime(self.provider)
        try:
            chosen = choose_provider(ort, self.provider)
            self._limits = shape_limits(self._bundle, self.name) if chosen.profiled else None
            if self._patch is not None and self._weights is not None:
                self._patch.apply(self._weights)
            self._session = self._open(ort, chosen)
        except SdxlTrtError:
            raise
        except MemoryError as exc:
            raise _out_of_memory(f"loading {self.name}") from exc
        except Exception as exc:
            raise _explain(exc, f"loading {self.name}") from exc
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
            with _explained(f"running {self.name}"):
                return dict(zip(names, self._session.run(names, feed), strict=True))
        with _explained(f"running {self.name}"):
            return {name: value.numpy() for name, value in self._values(names, feed, inputs).items()}

    def infer_on_device(self, inputs: Mapping[str, Value]) -> dict[str, DeviceArray]:
        """Run the session and keep its outputs as OrtValues; see Engine.infer_on_device."""
        feed = self._feed(inputs)
        with _explained(f"running {self.name}"):
            values = self._values(self.component.results, feed, inputs)
            return {name: self._on_device(name, value) for name, value in values.items()}

    def infer_keeping(
        self, inputs: Mapping[str, Value], kept: Collection[str], outputs: Sequence[str]
    ) -> tuple[dict[str, Array], dict[str, DeviceArray]]:
        """Run the session; see Engine.infer_keeping. Each call has OrtValues of its own, valid while held."""
        feed = self._feed(inputs)
        with _explained(f"running {self.name}"):
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
        """Return every input of the graph: `inputs`, the constants with as many rows, zeros for what may be missing."""
        if self._session is None:
            raise EngineError(f"{self.name}: infer before load; call load() first")
        constants = with_rows(self.component, self._constants, rows_of(self.component, inputs))
        feed: dict[str, Value] = {**constants, **inputs}
        feed = {**fill_optional(self.component, feed), **feed}
        check_inputs(self.component, feed)
        for name, value in feed.items():
            if isinstance(value, DeviceArray) and value.home != self._home:
                raise UsageError(f"{self.name}: input {name} is on {value.home}, but this engine runs on {self._home};"
                                 " run both components with one provider")  # fmt: skip
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

    def _forget_files(self) -> None:
        self._graph = None
        weights, self._weights = self._weights, None
        if weights is not None:
            with suppress(BufferError):  # an error on its way still refers to views, which free the map with it
                weights.close()


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


@contextlib.contextmanager
def _explained(doing: str) -> Iterator[None]:
    """Raise the errors of ONNX Runtime as ours."""
    try:
        yield
    except SdxlTrtError:
        raise
    except MemoryError as exc:
        raise _out_of_memory(doing) from exc
    except Exception as exc:
        raise _explain(exc, doing) from exc


def _explain(exc: Exception, doing: str) -> SdxlTrtError:
    """Map an ONNX Runtime exception: they have no common base class, and only the message identifies memory errors."""
    text = " ".join(str(exc).split())
    if any(sign in text for sign in ("bad_alloc", "Failed to allocate", "bad allocation", "out of memory")):
        return _out_of_memory(doing)
    if "engine from cache" in text:
        return IncompatibleError(f"{doing}: an engine that was compiled earlier does not load ({text[:200]}); TensorRT,"
                                 " the driver or the GPU has changed: remove sdxl-trt/onnxruntime from the cache folder"
                                 " (XDG_CACHE_HOME or ~/.cache)")  # fmt: skip
    if "cannot open shared object file" in text:
        return IncompatibleError(f"{doing}: ONNX Runtime misses a library ({text[-200:]}); trt-inspect --doctor says"
                                 " which, and what to install")  # fmt: skip
    return EngineError(f"{doing}: ONNX Runtime failed: {text[:300]}; rerun with --debug for the full message")


def _out_of_memory(doing: str) -> ResourceError:
    return ResourceError(f"{doing}: out of memory; try --residency swap, a smaller size, or fewer pictures at once")
