"""Fixtures of the peers' tests: folders exported by the project's own environment; run with ``make test-peers``."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
os.environ["HF_HUB_OFFLINE"] = "1"


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# The ordinary suite has neither optimum-onnx nor the old libraries, and collects nothing here.
collect_ignore_glob = [] if _is_installed("optimum-onnx") else ["*"]
_MEASURED = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exports", metavar="DIR", help="folder to export to; reuses an earlier run's exports")


@pytest.fixture(scope="session")
def exports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a sub-folder per pair, which has base, refiner, bundle and optimum."""
    asked = request.config.getoption("--exports")
    folder = Path(asked).resolve() if asked else tmp_path_factory.mktemp("exports")
    if not (folder / ".done").exists():
        python = ROOT / ".venv" / "bin" / "python"
        subprocess.run([python, Path(__file__).with_name("make_exports.py"), folder], check=True, timeout=1800)
    return folder


@pytest.fixture(scope="session")
def sampling() -> Iterator[ModuleType]:
    """Return k-diffusion's sampling module, loaded without its package's __init__, which needs missing libraries."""
    spec = importlib.util.find_spec("k_diffusion")
    assert spec is not None
    assert spec.origin is not None
    package = ModuleType("k_diffusion")
    package.__path__ = [str(Path(spec.origin).parent)]
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    stubs = {"k_diffusion": package} | {name: ModuleType(name) for name in names}
    stubs["torchvision.transforms"].functional = stubs[names[-1]]  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module("k_diffusion.sampling")


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return a function that adds a line to the table at the end of the run."""
    return request.config.stash.setdefault(_MEASURED, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(_MEASURED, [])
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)
