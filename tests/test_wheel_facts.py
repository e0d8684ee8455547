"""The extras for GPUs against facts of the published wheels: an extra brings every library that its packages need.

tests/wheel_facts/refresh.py reads the facts from the wheels; it needs a network, this test does not.
"""

import importlib.util
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from sdxl_trt.engines.backends.ort.libraries import needed_libraries

ROOT = Path(__file__).parent.parent
WHEELS: dict[str, dict[str, Any]] = json.loads((ROOT / "tests/wheel_facts/facts.json").read_text())["wheels"]
EXTRAS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
CUDA, TENSORRT = "libonnxruntime_providers_cuda.so", "libonnxruntime_providers_tensorrt.so"
DRIVER = {"libcuda.so.1", "libnvidia-ml.so.1"}
"""What comes with the NVIDIA driver and with no package."""
PINS = {"cu13": "constraints.txt", "cu12": "constraints-cu12.txt"}
# ONNX Runtime opens these when it first needs them: no header names them.
OPENED_LATER = {CUDA: {"libcudnn.so.9"}}
TENSORRT_10 = {"tensorrt-cu13-libs": "10.16.1.11"}
"""The extra ort-tensorrt has no pins: those of TensorRT 11 do not fit it."""


def _facts(name: str, version: str) -> dict[str, Any]:
    return WHEELS[f"{canonicalize_name(name)}=={version}"]


def _pins(file: str) -> dict[str, str]:
    pairs = (line.split("==") for line in (ROOT / file).read_text().splitlines() if "==" in line)
    return {canonicalize_name(name): version for name, version in pairs}


def _brought(extra: str, pins: Mapping[str, str]) -> dict[str, str]:
    """Return {package: version} of all packages of `extra` of which there are facts, required ones too."""
    found: dict[str, str] = {}
    waiting = [Requirement(text) for text in EXTRAS[extra]]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        version = pins.get(name)
        if version is None or f"{name}=={version}" not in WHEELS:
            continue
        assert requirement.specifier.contains(Version(version)), f"{extra}: {name}=={version} is not {requirement}"
        found[name] = version
        for text in _facts(name, version).get("requires", []):
            required = Requirement(text)
            if required.marker is None or any(
                required.marker.evaluate({"extra": each}) for each in ("", *requirement.extras)
            ):
                waiting.append(required)
    return found


def _libraries(packages: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, version in packages.items():
        for path, library in _facts(name, version).get("libraries", {}).items():
            yield Path(path).name, library


def _provided(packages: Mapping[str, str]) -> set[str]:
    """Return the names of all libraries in `packages`; of placeholders, what their own bindings need of them."""
    provided = {library["soname"] for _, library in _libraries(packages)}
    for name, version in packages.items():
        if "unreadable" in _facts(name, version):
            bindings = _facts(name.replace("-libs", "-bindings"), version)["libraries"].values()
            provided |= {needed for library in bindings for needed in library["needed"]}
    return provided


def _missing(packages: Mapping[str, str], library: str) -> set[str]:
    """Return what `library`, and what it needs in turn, lacks in `packages`."""
    needs = {name: set(found["needed"]) | OPENED_LATER.get(name, set()) for name, found in _libraries(packages)}
    needs |= {found["soname"]: set(found["needed"]) for _, found in _libraries(packages)} | {library: needs[library]}
    reached: set[str] = set()
    waiting = {library}
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= needs.get(name, set()) - reached
    return reached - {library} - _provided(packages) - DRIVER


@pytest.mark.parametrize(
    ("extra", "cuda", "library"),
    [
        ("gpu", "cu13", CUDA), ("gpu-cu12", "cu12", CUDA), ("ort-tensorrt", "cu13", TENSORRT),
        ("tensorrt", "cu13", "tensorrt.so"), ("tensorrt-cu12", "cu12", "tensorrt.so"),
        ("tensorrt-rtx", "cu13", "tensorrt_rtx.so"), ("tensorrt-rtx-cu12", "cu12", "tensorrt_rtx.so"),
    ],
)  # fmt: skip
def test_an_extra_brings_every_library_that_its_packages_need(extra: str, cuda: str, library: str) -> None:
    pins = _pins(PINS[cuda]) | (TENSORRT_10 if extra == "ort-tensorrt" else {})
    packages = _brought(extra, pins)
    assert library in {name for name, _ in _libraries(packages)}
    assert _missing(packages, library) == set()


def test_without_its_extras_onnxruntime_lacks_what_the_doctor_names() -> None:
    """The check can fail: this is what pip installs for the bare package."""
    lacking = _missing({"onnxruntime-gpu": "1.31.1"}, CUDA)
    assert lacking == {"libcublas.so.13", "libcublasLt.so.13", "libcudart.so.13", "libcurand.so.10", "libcudnn.so.9"}
    assert _missing({"onnxruntime-gpu": "1.31.1"}, TENSORRT) >= {"libnvinfer.so.10", "libnvonnxparser.so.10"}


@pytest.mark.parametrize("cuda", ["12", "13"])
def test_the_rtx_plugin_contains_what_it_needs(cuda: str) -> None:
    plugin = {f"onnxruntime-ep-nv-tensorrt-rtx-cu{cuda}": "0.5.0"}
    assert _missing(plugin, "libonnxruntime_providers_nv_tensorrt_rtx.so") == set()


def test_tensorrt_11_is_no_help_for_onnx_runtime_s_provider() -> None:
    """ONNX Runtime's provider is built for TensorRT 10: another extra, since one environment holds one TensorRT."""
    packages = _brought("gpu", _pins(PINS["cu13"])) | _brought("tensorrt", _pins(PINS["cu13"]))
    assert _missing(packages, TENSORRT) == {"libnvinfer.so.10", "libnvonnxparser.so.10"}


@pytest.mark.parametrize(("version", "cuda"), [("1.26.0", "12"), ("1.27.0", "13"), ("1.28.0", "13"), ("1.31.1", "13")])
def test_the_extra_of_a_version_is_that_of_its_cuda(version: str, cuda: str) -> None:
    library = _facts("onnxruntime-gpu", version)["libraries"][f"onnxruntime/capi/{CUDA}"]
    assert f"libcudart.so.{cuda}" in library["needed"]
    allowed = {extra: Requirement(EXTRAS[extra][0]).specifier.contains(version) for extra in ("gpu", "gpu-cu12")}
    # The packages that 1.27 requires for CUDA 13 do not exist under those names.
    assert allowed == {"gpu": cuda == "13" and version != "1.27.0", "gpu-cu12": cuda == "12"}


def test_facts_and_pins_are_of_the_same_versions() -> None:
    """After a change of pins the facts must be read again."""
    pinned = {f"{name}=={version}" for file in PINS.values() for name, version in _pins(file).items()}
    names = {spec.partition("==")[0] for spec in pinned}
    wanted = re.compile(r"onnxruntime-gpu|onnxruntime-ep-|tensorrt|cuda-bindings|nvidia-(cublas|cudnn|cufft|curand)")
    assert {spec for spec in pinned if wanted.match(spec)} <= WHEELS.keys()
    assert {spec.partition("==")[0] for spec in WHEELS} <= names


def test_what_cu12_shares_has_the_same_pins() -> None:
    base, own = _pins(PINS["cu13"]), _pins(PINS["cu12"])
    differing = {name for name in base.keys() & own.keys() if base[name] != own[name]}
    assert differing == {"cuda-bindings", "onnxruntime-gpu"}


def test_the_facts_are_those_of_the_installed_wheels() -> None:
    """Our reader against readelf's facts."""
    package = "onnxruntime_ep_nv_tensorrt_rtx"
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the plugin is not installed")
    folder = Path(spec.submodule_search_locations[0])
    for name, library in _facts("onnxruntime-ep-nv-tensorrt-rtx-cu12", "0.5.0")["libraries"].items():
        found = needed_libraries(folder / Path(name).name)
        assert [each for each in found if each in library["needed"]] == library["needed"]
