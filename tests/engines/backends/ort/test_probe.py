"""Whether an execution provider can start: packages for GPUs that are as installed by pip, on machines of all kinds."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdxl_trt.engines.backends.cuda.driver import Driver, Gpu, Problem
from sdxl_trt.engines.backends.ort import probe
from sdxl_trt.engines.backends.ort.engine import _incompatibility
from sdxl_trt.engines.backends.ort.probe import CUDA, TENSORRT, plugin_problem, provider_problem
from sdxl_trt.engines.backends.ort.providers import RTX, ExecutionProvider, choose_provider, plugin_devices
from sdxl_trt.engines.errors import IncompatibleError

CPU = "CPUExecutionProvider"
ADA = (Gpu("NVIDIA L4", (8, 9), 24 << 30),)
HOPPER = (Gpu("NVIDIA H100", (9, 0), 80 << 30),)
SYSTEM = ("libc.so.6", "libm.so.6")


class Runtime(SimpleNamespace):
    """An installed onnxruntime-gpu; a namespace has no hash."""

    __hash__ = object.__hash__


@pytest.fixture
def install(tmp_path: Path, write_library: Callable[..., Path]) -> Callable[..., Any]:
    """Return a function that makes an ONNX Runtime whose CUDA and TensorRT providers need the libraries given."""

    def make(
        cuda: tuple[str, ...] = SYSTEM, tensorrt: tuple[str, ...] = SYSTEM, version: str = "13.0", **others: Any
    ) -> Any:
        folder = tmp_path / "onnxruntime"
        write_library(folder / "capi" / "libonnxruntime_providers_cuda.so", *cuda)
        write_library(folder / "capi" / "libonnxruntime_providers_tensorrt.so", *tensorrt)
        settings = {
            "get_available_providers": lambda: [TENSORRT, CUDA, CPU], "preload_dlls": lambda: None,
            "cuda_version": version, "__file__": str(folder / "__init__.py"),
        }  # fmt: skip
        return Runtime(**settings | others)

    return make


@pytest.fixture(autouse=True)
def _machine(use_driver: Callable[[Driver], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_driver(Driver((13, 0), ADA))
    monkeypatch.setattr(probe, "_OPENED_LATER", {CUDA: (), TENSORRT: ()})
    monkeypatch.setattr(probe, "_installed", lambda package: package == "onnxruntime-gpu")
    return None


@pytest.mark.parametrize("name", [CUDA, TENSORRT])
def test_a_provider_whose_libraries_load_can_start(install: Any, name: str) -> None:
    assert provider_problem(install(), name) is None


def test_pip_s_libraries_are_loaded_first_and_quietly(install: Any, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []

    def preload() -> None:
        calls.append("preloaded")
        print("Failed to load libcublasLt.so.13")

    runtime = install(preload_dlls=preload)
    assert provider_problem(runtime, CUDA) is provider_problem(runtime, TENSORRT) is None
    assert calls == ["preloaded"]
    assert capsys.readouterr().out == ""


def test_a_missing_library_is_named_with_the_command(install: Any) -> None:
    runtime = install(cuda=("libc.so.6", "libcublasLt.so.99", "libcurand.so.98"))
    assert provider_problem(runtime, CUDA) == Problem("libcublasLt.so.99 is missing", "pip install 'sdxl-trt[gpu]'")
    with pytest.raises(IncompatibleError, match=r"^provider ort-cuda cannot start: libcublasLt\.so\.99 is missing"):
        choose_provider(runtime, "ort-cuda")


def test_a_library_that_onnx_runtime_misses_is_no_defect() -> None:
    """What the probe overlooks still has the exit code of a machine that cannot run it."""
    said = "[ONNXRuntimeError] : 1 : FAIL : with error: libnvinfer.so.10: cannot open shared object file: No such file"
    error = _incompatibility("loading unet", said)
    assert isinstance(error, IncompatibleError)
    assert "libnvinfer.so.10" in str(error)
    assert "trt-inspect --doctor" in str(error)


def test_a_library_that_is_opened_later_is_checked_too(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_OPENED_LATER", {CUDA: ("libcudnn.so.99",)})
    assert "libcudnn.so.99 is missing" in str(provider_problem(install(), CUDA))


def test_tensorrt_10_has_an_extra_of_its_own(install: Any, use_driver: Callable[[Driver], None]) -> None:
    use_driver(Driver((13, 0), HOPPER))
    problem = provider_problem(install(tensorrt=("libnvinfer.so.10", "libcublas.so.99")), TENSORRT)
    assert problem is not None
    assert problem.reason == "libnvinfer.so.10 is missing"
    assert "pip install 'sdxl-trt[ort-tensorrt]'" in problem.remedy


def test_tensorrt_without_its_library_is_the_plugin(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdxl_trt.engines.backends.ort import providers

    runtime = install(tensorrt=("libnvinfer.so.10",))
    monkeypatch.setattr(providers, "_has_plugin", lambda: True)
    assert choose_provider(runtime, "ort-tensorrt") == ExecutionProvider(RTX, plugin=True, profiled=True)
    assert choose_provider(install(), "ort-tensorrt") == ExecutionProvider(TENSORRT, profiled=True)
    monkeypatch.setattr(providers, "_has_plugin", lambda: False)
    with pytest.raises(IncompatibleError, match=r"ort-tensorrt cannot start: libnvinfer\.so\.10 is missing; "):
        choose_provider(install(tensorrt=("libnvinfer.so.10",)), "ort-tensorrt")


def test_a_driver_for_cuda_12_gets_the_packages_for_cuda_12(install: Any, use_driver: Callable[[Driver], None]) -> None:
    use_driver(Driver((12, 4), ADA))
    assert provider_problem(install(), CUDA) == Problem(
        "this ONNX Runtime is built for CUDA 13, and the NVIDIA driver supports only CUDA 12.4",
        "pip uninstall -y onnxruntime-gpu && pip install 'sdxl-trt[gpu-cu12]'",
    )
    assert provider_problem(install(version="12.8"), CUDA) is None
    missing = provider_problem(install(version="12.8", cuda=("libcublas.so.99",)), CUDA)
    assert missing == Problem("libcublas.so.99 is missing", "pip install 'sdxl-trt[gpu-cu12]'")


def test_the_driver_s_problem_comes_first(install: Any, use_driver: Callable[[Driver], None]) -> None:
    problem = Problem("the NVIDIA driver finds no GPU", "look for it")
    use_driver(Driver((13, 0), problem=problem))
    assert provider_problem(install(cuda=("libcublas.so.99",)), CUDA) == problem


@pytest.mark.parametrize(
    ("installed", "command"),
    [
        (("onnxruntime",), "pip uninstall -y onnxruntime && pip install 'sdxl-trt[gpu]'"),
        (("onnxruntime", "onnxruntime-gpu"),
         "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'sdxl-trt[gpu]'"),
    ],
)  # fmt: skip
def test_packages_that_overwrite_each_other_are_both_removed(
    install: Any, monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], command: str
) -> None:
    monkeypatch.setattr(probe, "_installed", installed.__contains__)
    problem = provider_problem(install(get_available_providers=lambda: [CPU]), CUDA)
    assert problem == Problem(f"this ONNX Runtime has {CPU}, not {CUDA}", command)


@pytest.mark.parametrize(
    ("driver", "command"),
    [
        (Driver((13, 0), ADA), "pip install onnxruntime-ep-nv-tensorrt-rtx-cu13"),
        (Driver((12, 4), ADA), "pip install onnxruntime-ep-nv-tensorrt-rtx-cu12"),
        (Driver((13, 0), HOPPER), "make a new environment and run there: pip install 'sdxl-trt[ort-tensorrt]'"),
        (Driver((12, 4), HOPPER), "use --provider tensorrt instead: pip install 'sdxl-trt[tensorrt-cu12]'"),
    ],
)
def test_the_plugin_is_offered_for_the_gpus_that_it_supports(
    install: Any, use_driver: Callable[[Driver], None], driver: Driver, command: str
) -> None:
    use_driver(driver)
    problem = provider_problem(install(get_available_providers=lambda: [CPU]), TENSORRT)
    assert problem is not None
    assert problem.remedy == command


def test_a_plugin_for_a_newer_cuda_than_the_driver_s_is_refused(
    use_driver: Callable[[Driver], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_installed", lambda package: package.endswith("-cu13"))
    assert plugin_problem() is None
    use_driver(Driver((12, 8), ADA))
    with pytest.raises(IncompatibleError, match=r"is built for CUDA 13, .* only CUDA 12\.8; pip uninstall -y .*-cu12$"):
        plugin_devices(Runtime())


def test_a_package_without_the_library_or_with_a_damaged_one(install: Any) -> None:
    runtime = install()
    library = Path(runtime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    library.write_bytes(b"\x7fELF")
    assert "libonnxruntime_providers_cuda.so cannot be read" in str(provider_problem(runtime, CUDA))
    library.unlink()
    assert "libonnxruntime_providers_cuda.so is missing from the package" in str(provider_problem(runtime, CUDA))
