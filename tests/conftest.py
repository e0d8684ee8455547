"""Small pairs, the bundles exported from them, and the simulated device, shared by all tests."""

import copy
import functools
import gc
import importlib.util
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

# No deadlines: durations depend on how busy the machine is.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

# Two test processes on two cores: torch's spinning threads would starve both, and so would those of ONNX Runtime.
os.environ["OMP_NUM_THREADS"] = "1"


def _import_package(folder: str) -> Any:
    """Import a package of the tests by its folder's name; tests/ is not on sys.path: it has a folder `tensorrt`."""
    file = Path(__file__).parent / folder / "__init__.py"
    name = file.parent.name
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# Test modules import from them at their top: they themselves import torch and diffusers inside functions.
_import_package("small_models")
_import_package("references/independent")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Let each session of ONNX Runtime compute in the thread that calls it; its own threads spin between calls."""
    import onnxruntime

    class OneThread(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", OneThread)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files with slow tests first, so that no worker is left with one while the others have nothing to do.

    They are taken from both ends of the list in turns: neighbours share exports, and would wait for each other's.
    """
    slow = list(dict.fromkeys(item.path for item in items if item.get_closest_marker("slow")))
    ends = [path for pair in zip(slow, reversed(slow), strict=True) for path in pair]
    rank = {path: place for place, path in enumerate(dict.fromkeys(ends))}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_collection_finish() -> None:
    """Exclude the imports' hundreds of thousands of permanent objects from garbage collection."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Pair:
    """A pair's diffusers folders, and the fp32 bundle exported from them on first use."""

    name: str
    shape: Any
    base: Path
    refiner: Path
    export: Callable[[], Path]

    @property
    def bundle(self) -> Path:
        """The exported bundle, shared by all tests: do not change it."""
        return self.export()


def _shared(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Make a folder once for all test processes."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if root.name.startswith("popen-") else root
    target = root / f"shared-{name}"
    with FileLock(root / f"{name}.lock"):
        done = target / ".done"
        if not done.exists():
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            make(target)
            done.touch()
    return target


Convert = Callable[..., Any]


@pytest.fixture(scope="session")
def translations_once() -> Iterator[None]:
    """Let torch's exporter collect its table of translations once per process, instead of a second for each graph."""
    from torch.onnx._internal.exporter import _registration

    usual = _registration.ONNXRegistry
    collected = functools.cache(lambda opset: usual.from_torchlib(opset_version=opset))

    class Registry(usual):
        @classmethod
        def from_torchlib(cls, opset_version: int) -> Any:
            found = copy.copy(collected(opset_version))
            found.functions = {target: list(each) for target, each in found.functions.items()}  # exports add their own
            return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registration, "ONNXRegistry", Registry)
        yield


@pytest.fixture(scope="session")
def convert_once(tmp_path_factory: pytest.TempPathFactory, translations_once: None) -> Convert:
    """Return a replacement for the exporter's `convert` that copies what any test process has converted before.

    A component's key covers everything that determines its files, so converting it again would test nothing new.
    """

    def convert(name: str, plan: Any, key: str, root: Path, *rest: Any, into: str | None = None) -> Any:
        from sdxl_trt.export.components import convert as conversion

        def make(folder: Path) -> None:
            conversion.convert_component(name, plan, key, root, *rest)
            shutil.copytree(root / name, folder / name)

        kept, target = _shared(tmp_path_factory, f"{name}-{key[:16]}", make), into or name
        shutil.rmtree(root / target, ignore_errors=True)
        shutil.copytree(kept / name, root / target)
        record = root / target / conversion.RECORD_FILE
        record.write_text(record.read_text().replace(f'"{name}/', f'"{target}/'))
        found = conversion.finished(root, target, key)
        assert found is not None
        return found.of(conversion.component_source(plan), conversion.kept_config(plan))  # as when it resumes

    return convert


@pytest.fixture
def converted_once(convert_once: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this test's exports reuse components converted before."""
    monkeypatch.setattr("sdxl_trt.export.exporter.convert_component", convert_once)


def _export_with(convert: Convert, pair: Pair, out: Path, **options: Any) -> None:
    """Export a pair, with components that any test process has converted before."""
    from sdxl_trt.export import Options, export_bundle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdxl_trt.export.exporter.convert_component", convert)
        export_bundle(pair.base, pair.refiner, out, Options(**options))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory, convert_once: Convert) -> Callable[[str], Pair]:
    """Return a function from a name in small_models' SHAPES to its Pair, made once."""
    from small_models.pairs import SHAPES, make_pair

    def get(name: str) -> Pair:
        shape = SHAPES[name]

        folder = _shared(tmp_path_factory, name, lambda folder: make_pair(folder, shape))

        def make(bundle: Path) -> None:
            _export_with(convert_once, pair, bundle / "bundle", precision="fp32")

        def export() -> Path:
            return _shared(tmp_path_factory, f"{name}-bundle", make) / "bundle"

        pair = Pair(name, shape, folder / "base", folder / "refiner", export)
        return pair

    return get


@pytest.fixture(scope="session")
def eight_bit_bundle(
    tmp_path_factory: pytest.TempPathFactory, pairs: Callable[[str], Pair], convert_once: Convert
) -> Path:
    """Return a bundle of the pair "outline" whose UNets and decoder compute in int8: do not change it.

    ``ranges.npz`` beside it has its ranges, ``report.json`` its layers' errors.
    """

    def make(folder: Path) -> None:
        from sdxl_trt.export.components import CalibrationOptions

        calibration = CalibrationOptions(prompts=("a red fox",), steps=(2, 1), save=folder / "ranges.npz",
                                         report=folder / "report.json")  # fmt: skip
        _export_with(convert_once, pairs("outline"), folder / "bundle", precision="int8", vae_precision="int8",
                     calibration=calibration)  # fmt: skip

    return _shared(tmp_path_factory, "eight-bit", make) / "bundle"


@pytest.fixture(scope="session")
def fp8_bundle(
    tmp_path_factory: pytest.TempPathFactory,
    pairs: Callable[[str], Pair],
    convert_once: Convert,
    eight_bit_bundle: Path,
) -> Path:
    """Return a bundle of the same pair and ranges whose UNets compute in FP8: do not change it."""

    def make(folder: Path) -> None:
        from sdxl_trt.export.components import CalibrationOptions

        calibration = CalibrationOptions(file=eight_bit_bundle.parent / "ranges.npz")
        _export_with(convert_once, pairs("outline"), folder / "bundle", precision="fp8", calibration=calibration)

    return _shared(tmp_path_factory, "fp8", make) / "bundle"


@pytest.fixture(scope="session")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the embedded bundle with two toy ControlNets, edges and poses: do not change it."""
    from small_models.controlnets import add_controlnets

    from sdxl_trt.mini.embedded import bundle_path

    return (
        _shared(tmp_path_factory, "controlled", lambda folder: add_controlnets(bundle_path(), folder / "bundle"))
        / "bundle"
    )


@pytest.fixture(scope="session")
def partly_int8_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the embedded bundle with some layers of its UNets in int8: do not change it."""
    from small_models.eight_bit import make_eight_bit

    from sdxl_trt.mini.embedded import bundle_path

    made = _shared(tmp_path_factory, "int8", lambda folder: make_eight_bit(bundle_path(), folder / "bundle"))
    return made / "bundle"


@pytest.fixture(scope="session")
def add_controlnets() -> Callable[[Path, Path], None]:
    """Return the function that copies a bundle with two toy ControlNets added."""
    from small_models import controlnets

    return controlnets.add_controlnets


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command, checks its exit code and one-line error, and returns the line."""

    def run(command: Callable[[list[str]], int], arguments: list[str], code: int) -> str:
        capsys.readouterr()
        try:
            found = command(arguments)
        except SystemExit as exc:  # argparse's own errors
            found = exc.code
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if not line.startswith(("warning:", "note:"))]
        assert captured.out == ""
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        assert found == code, lines[0]
        return lines[0]

    return run


class Terminal(io.StringIO):
    """A terminal that keeps the lines drawn on it, at the time that `clock` says."""

    clock = 0.0

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.getvalue().split("\r") if line.strip()]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    for clock in ("sdxl_trt.engines.host.progress.time.time", "tqdm.std.time"):
        monkeypatch.setattr(clock, lambda: terminal.clock)
    return terminal


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def simulated() -> Iterator[Any]:
    """A SimulatedDevice with its replacements for `tensorrt` and `cuda.bindings.runtime` installed."""
    device = _import_package("simulated").SimulatedDevice()
    device.install()
    yield device
    device.remove()
    if device.leaks_matter:
        device.check_no_leaks()
