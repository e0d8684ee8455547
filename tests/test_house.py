"""The house rules that no linter knows: who may import whom, what is exported, what the runtime does without."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sdxl_trt.engines

ROOT = Path(sdxl_trt.engines.__file__).parent.parent
PARTS = ("engines", "runtime", "export")
FORBIDDEN = {"engines": {"runtime", "export", "mini"}, "runtime": {"export"}, "export": {"runtime"}}
HEAVY = ("torch", "diffusers", "transformers", "scipy", "pandas", "onnx", "onnx_ir", "onnxscript", "safetensors")
MODULES = [path for part in PARTS for path in sorted((ROOT / part).glob("*.py"))]
PREFIX = "sdxl_trt."


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _imports(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that are imported anywhere in `tree`, and `from` names as if they were modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))


def _broken_arrows(part: str, source: str) -> list[str]:
    targets = [name.removeprefix(PREFIX).split(".") for name in _imports(ast.parse(source)) if name.startswith(PREFIX)]
    return [
        ".".join(target)
        for target in targets
        if target[0] in FORBIDDEN[part] | {"benchmarks", "tests"} or target[1:2] == ["cli"]
    ]


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_arrows_point_one_way(path: Path) -> None:
    assert _broken_arrows(path.parent.name, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("engines", "from sdxl_trt.runtime.request.request import Request"),
        ("engines", "def f():\n    import sdxl_trt.mini"),
        ("engines", "from sdxl_trt import export"),
        ("runtime", "from sdxl_trt.export import export_bundle"),
        ("export", "import sdxl_trt.runtime.diffusion.noise.generator as noise"),
        ("runtime", "from sdxl_trt.runtime.cli.generate import main"),
        ("export", "from sdxl_trt.export import cli"),
        ("runtime", "from sdxl_trt.benchmarks import latency"),
    ],
)
def test_a_wrong_arrow_would_be_found(part: str, source: str) -> None:
    assert _broken_arrows(part, source)


def _exported(path: Path) -> list[str] | None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return None


def _rank(name: str) -> tuple[int, str]:
    """Return ruff's order: constants, classes, functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_all_is_sorted_and_without_doubles(path: Path) -> None:
    names = _exported(path)
    if names is None:
        assert path.name == "__init__.py", "a module states what it exports"
        return
    assert names == sorted(set(names), key=_rank)


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_all_names_what_is_there(path: Path) -> None:
    source = ast.parse(path.read_text(encoding="utf-8"))
    bound = {node.id for node in ast.walk(source) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.name for node in ast.walk(source) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    bound |= {
        alias.asname or alias.name
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(_exported(path) or ()) <= bound


BLOCK = """
import importlib, sys
for name in {heavy!r}:
    sys.modules[name] = None
for name in {names!r}:
    importlib.import_module(name)
from sdxl_trt.runtime import Pipeline, Picture, Request, Step, open_bundle
print("imported", len({names!r}))
"""


def _import_blocked(names: list[str]) -> subprocess.CompletedProcess[str]:
    code = BLOCK.format(heavy=HEAVY, names=names)
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def _module_names(part: str) -> list[str]:
    paths = [path for path in MODULES if path.parent.name == part]
    return [f"sdxl_trt.{part}" + ("" if path.stem == "__init__" else f".{path.stem}") for path in paths]


def test_engines_and_runtime_import_without_torch() -> None:
    names = _module_names("engines") + _module_names("runtime")
    done = _import_blocked(names)
    assert done.stdout == f"imported {len(names)}\n", done.stderr


def test_a_module_that_needs_torch_would_be_found() -> None:
    done = _import_blocked(["sdxl_trt.export.checkpoints.checkpoint"])
    assert done.returncode == 1
    assert "torch" in done.stderr
