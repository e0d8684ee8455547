"""Workplaces on the simulated device, with a small pair for the embedded one."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.benchmarks.gpu_check.checks import Check, Workplace, all_checks, make_workplace, pictures, timing
from sdxl_trt.benchmarks.gpu_check.checks import workplace as workplaces
from sdxl_trt.benchmarks.gpu_check.child import run_check
from sdxl_trt.benchmarks.measure.gpu_record import CheckResult
from sdxl_trt.engines.backends.ort import providers as ort_providers
from sdxl_trt.engines.bundle.profile import fixed

MakeBundle = Callable[..., Path]


@pytest.fixture(scope="session")
def exported(pairs: Callable[[str], Any]) -> Path:
    return Path(pairs("outline").bundle)


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that keeps what ONNX Runtime's CPU provider computed: it depends on the graphs alone."""
    return tmp_path_factory.mktemp("references")


@pytest.fixture
def make_bundle(exported: Path, simulated: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MakeBundle:
    """Return a function that makes a simulated bundle whose UNets have a static profile beside that of the range."""
    from simulated import bundles

    usual = bundles.axes_of

    def axes_of(kind: str, precision: str, sizes: Any, factor: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = usual(kind, precision, sizes, factor)
        if kind != "unet" or len(found) > 1:
            return found
        return [{name: fixed(axis.opt) for name, axis in found[0].items()}, *found]

    def make(name: str = "source", **settings: Any) -> Path:
        monkeypatch.setattr(bundles, "axes_of", axes_of)
        settings = {"weight_streaming": True} | settings
        return Path(bundles.make_simulated_bundle(simulated, exported, tmp_path / name, **settings))

    return make


@pytest.fixture
def embedded(make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> MakeBundle:
    """Return a function that makes a simulated bundle and puts it in the place of the embedded pair."""
    monkeypatch.setattr(ort_providers, "_has_plugin", lambda: False)

    def make(**settings: Any) -> Path:
        bundle = make_bundle(**settings)
        monkeypatch.setattr(workplaces, "bundle_path", lambda: bundle)
        return bundle

    return make


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw and time less: the simulated device computes on a CPU."""
    monkeypatch.setitem(workplaces.STEPS, True, 4)
    monkeypatch.setattr(timing, "_STEPS", 3)
    monkeypatch.setattr(timing, "_WARM", 1)
    monkeypatch.setattr(timing, "_TIMED", 1)
    monkeypatch.setattr(pictures, "PICTURES", 2)


@pytest.fixture(scope="session")
def sessions() -> dict[tuple[bytes, str], Any]:
    """Return ONNX Runtime's sessions by graph and weights: making one takes longer than most checks."""
    return {}


@pytest.fixture(autouse=True)
def shared_sessions(sessions: dict[tuple[bytes, str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    usual = ort_providers.ExecutionProvider.open

    def shared(self: Any, ort: Any, graph: bytes, options: Any, bundle: Any, component: str, limits: Any) -> Any:
        key = (graph, bundle.manifest.components[component].weights.sha256)
        if key not in sessions or self.device != "cpu":
            sessions[key] = usual(self, ort, graph, options, bundle, component, limits)
        return sessions[key]

    monkeypatch.setattr(ort_providers.ExecutionProvider, "open", shared)


@pytest.fixture
def workplace(embedded: MakeBundle, references: Path, tmp_path: Path) -> Iterator[Workplace]:
    embedded()
    folder = tmp_path / "workplace"
    shutil.copytree(references, folder)
    make_workplace(folder, ours=True)
    yield Workplace(folder)
    for file in (*folder.glob("run-ort-cpu-*"), *folder.glob("array-*-ort-cpu-*")):
        if not (references / file.name).exists():
            shutil.copy(file, references)


def named(name: str) -> Check:
    (found,) = [check for check in all_checks() if check.name == name]
    return found


@pytest.fixture
def result_of(workplace: Workplace) -> Callable[[str], CheckResult]:
    """Return a function that runs a check of this name in the workplace, in this process."""
    return lambda name: run_check(named(name), Workplace(workplace.folder))
