"""NEEDED entries against readelf's, and what the loader says of a library that is missing."""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sdxl_trt.engines.backends.ort.libraries import load_problem, needed_libraries


def _published() -> list[Path]:
    """Return libraries of published wheels, of several linkers: with gaps between segments, and with none."""
    found: list[Path] = []
    for name in ("onnxruntime", "onnxruntime_ep_nv_tensorrt_rtx", "tensorrt_bindings", "numpy"):
        spec = importlib.util.find_spec(name)
        folders = (spec.submodule_search_locations or []) if spec else []
        found += [path for folder in folders for path in Path(folder).rglob("*.so*") if path.is_file()]
    return found


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_the_entries_are_readelf_s() -> None:
    libraries = _published()
    assert len(libraries) > 5
    done = subprocess.run(["readelf", "-d", *libraries], capture_output=True, text=True, check=True)
    parts = re.split(r"^File: (.*)$", done.stdout, flags=re.MULTILINE)[1:]
    told = {path: re.findall(r"\(NEEDED\).*\[(.+)\]", text) for path, text in zip(parts[::2], parts[1::2], strict=True)}
    assert {str(path): needed_libraries(path) for path in libraries} == told
    assert "libtensorrt_rtx.so.1" in {name for names in told.values() for name in names} or len(told) < 20


def test_the_string_table_is_found_by_address(tmp_path: Path, write_library: Callable[..., Path]) -> None:
    """In the file it lies elsewhere than in memory."""
    library = write_library(tmp_path / "lib.so", "libcublas.so.13", "libcudart.so.13")
    assert needed_libraries(library) == ["libcublas.so.13", "libcudart.so.13"]
    assert needed_libraries(write_library(tmp_path / "none.so")) == []


@pytest.mark.parametrize("keep", [0, 3, 63, 70, 130, 180])
def test_damaged_libraries_are_named(tmp_path: Path, write_library: Callable[..., Path], keep: int) -> None:
    library = write_library(tmp_path / "lib.so", "libcublas.so.13")
    library.write_bytes(library.read_bytes()[:keep])
    with pytest.raises((ValueError, OSError)):
        needed_libraries(library)


def test_what_is_missing_is_named_exactly(tmp_path: Path) -> None:
    assert load_problem("libc.so.6") is None
    assert load_problem("libcublas.so.99") == "libcublas.so.99 is missing"
    text = tmp_path / "libtext.so"
    text.write_text("no library")
    assert re.search(r"libtext\.so does not load \(.*(too short|invalid ELF header)", str(load_problem(str(text))))


def test_a_library_that_needs_a_missing_one_is_named_with_it(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    first, second = tmp_path / "libfirst.so", tmp_path / "libsecond.so.7"
    for target, extra in ((second, ()), (first, (str(second), "-Wl,--no-as-needed"))):
        command = [compiler, "-shared", f"-Wl,-soname,{target.name}", *reversed(extra), "-x", "c", "/dev/null"]
        subprocess.run([*command, "-o", target], check=True)
    second.unlink()
    assert "libsecond.so.7" in needed_libraries(first)
    assert load_problem(str(first)) == f"libsecond.so.7 is missing, which {first} needs"
