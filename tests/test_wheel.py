"""The wheel: every module and every data file is in it, and an environment that has only the wheel draws."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("sdxl_trt", "engines", "export", "runtime", "server", "mini", "benchmarks")
AT_HOME = "benchmarks/results/"
"""What only a checkout has: the recorded figures, from which `make readme` writes pages."""
BUILD = """
import sys
from setuptools import build_meta
print(build_meta.build_wheel(sys.argv[1], {"--build-option": "--compression=stored"}))
"""


def _files() -> list[str]:
    """Return the files below the folders of the package that git tracks, or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *FOLDERS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def _packaged(name: str) -> str:
    return name if name.startswith("sdxl_trt/") else f"sdxl_trt/{name}"


def test_every_folder_with_a_face_is_a_package() -> None:
    there = {_packaged(path.parent.relative_to(ROOT).as_posix() + "/").rstrip("/").replace("/", ".")
             for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")}  # fmt: skip
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert named == sorted(there)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a folder that is emptied at the end: the bundle is 45 MB, and is there four times over."""
    folder = tmp_path_factory.mktemp("wheel")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def wheel(folder: Path) -> Path:
    """Return a wheel that is built from a copy of the sources, without a network."""
    tree, out = folder / "tree", folder / "dist"
    for name in (*_files(), "pyproject.toml", "README.md", "LICENSE"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tree / name)
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def python(wheel: Path, folder: Path) -> Path:
    """Return the Python of an environment that has the wheel, and this environment's packages but the project."""
    home = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "--no-index", "--no-deps", "--quiet", str(wheel)], check=True)
    # The .pth files of a folder that a .pth file names are not read: the finder of an editable install stays out.
    library = sysconfig.get_paths()["stdlib"]
    packages = [each for each in sys.path if Path(each).is_dir() and not Path(each).is_relative_to(library)
                and not (Path(each) / "sdxl_trt").exists()] + [sysconfig.get_paths()["purelib"]]  # fmt: skip
    site = next(home.glob("lib/python*/site-packages"))
    (site / "packages.pth").write_text("".join(f"{each}\n" for each in packages))
    return python


@pytest.mark.slow
def test_the_wheel_has_every_module_and_every_data_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        size = sum(file.file_size for file in archive.infolist())
    there = {_packaged(name) for name in _files() if not name.startswith(AT_HOME)}
    assert len(there) > 350
    assert sorted(there - packed) == []
    assert sorted(packed - there) == []
    # The trained weights are in it once, in the bundle.
    assert size < 60e6


def _run(python: Path, place: Path, *arguments: str) -> str:
    place.mkdir(exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE"))}
    done = subprocess.run([str(python), *arguments], cwd=place, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_environment_with_the_wheel_alone_draws_and_estimates(python: Path, folder: Path) -> None:
    place = folder / "elsewhere"
    code = (
        "import sdxl_trt, sdxl_trt.export as e; print(sdxl_trt.__file__, e.__file__, sdxl_trt.__version__, sep='\\n')"
    )
    *files, version = _run(python, place, "-c", code).splitlines()
    assert all(Path(file).is_relative_to(folder / "environment") for file in files)
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    drawn = _run(python, place, "-m", "sdxl_trt.runtime.cli", "a star", "--steps", "3", "--seed", "1", "-o", "a.png")
    assert drawn == "a.png  seed 1  128x128\n"
    assert (place / "a.png").read_bytes().startswith(b"\x89PNG")
    estimate = json.loads(_run(python, place, "-m", "sdxl_trt.benchmarks.cli", "--estimate", "h100", "--json"))
    assert estimate["seconds"] > 0
