"""The house rules that no linter knows: rooms, arrows, faces, exports, and what the runtime does without."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import sdxl_trt

ROOT = Path(sdxl_trt.__file__).parent.parent
PARTS = ("engines", "export", "runtime", "server", "mini", "benchmarks")
HEAVY = ("torch", "diffusers", "transformers", "scipy", "pandas", "onnx", "onnx_ir", "onnxscript", "safetensors")
PREFIX = "sdxl_trt."
LAZY = "engines.lazy"
"""What makes a face import its names on first use."""
MOST_MODULES, MOST_FACE_LINES, MOST_FLOORS = 12, 40, 7
PATHS = [path for part in (*PARTS, "sdxl_trt") for path in sorted((ROOT / part).rglob("*.py"))]
FACES = [path for path in PATHS if path.name == "__init__.py"]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FOLDERS = [*dict.fromkeys(path.parent for path in PATHS), ROOT / "examples"]


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _module(path: Path) -> str:
    """Return the dotted name of a module below sdxl_trt: "engines.plans.files"; "" for the front door."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__").removeprefix("sdxl_trt")


MODULES = {_module(path): path for path in PATHS}
PACKAGES = {_module(path) for path in FACES}


def _room(module: str) -> str:
    """Return the wing of a module, or the module itself where it stands at the top of its part."""
    wing = module if module in PACKAGES else module.rpartition(".")[0]
    return module if wing in PARTS else wing


def _imports(source: str) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of every import below sdxl_trt, wherever it stands; `import` has no name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "sdxl_trt" or alias.name.startswith(PREFIX):
                    yield alias.name.removeprefix("sdxl_trt").removeprefix("."), ""
        elif isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(PREFIX):
            for alias in node.names:
                yield str(node.module).removeprefix("sdxl_trt").removeprefix("."), alias.name


def _targets(source: str) -> Iterator[str]:
    """Yield every module below sdxl_trt that is imported from: "" is the front door."""
    for module, name in _imports(source):
        full = f"{module}.{name}".removeprefix(".")
        yield full if full in MODULES else module


@cache
def _arrows() -> Mapping[str, frozenset[str]]:
    """Return {room: rooms of its part that it imports} and {part: parts that it imports}, as the code has them."""
    found: dict[str, set[str]] = {part: set() for part in ("sdxl_trt", "examples", *PARTS)}
    for module, path in {**MODULES, **{f"examples.{path.stem}": path for path in EXAMPLES}}.items():
        part, room = _part(module), _room(module)
        for target in _targets(path.read_text(encoding="utf-8")):
            if target == LAZY:
                continue
            if _part(target) != part:
                found[part].add(_part(target))
            elif module not in PARTS and target not in PARTS:
                found.setdefault(room, set()).add(_room(target))
    return {room: frozenset(rooms - {room}) for room, rooms in found.items()}


def _part(module: str) -> str:
    return module.split(".", maxsplit=1)[0] or "sdxl_trt"


@cache
def _drawn() -> Mapping[str, frozenset[str]]:
    """Return what `_arrows` returns as ARCHITECTURE.md draws it: the one table of arrows."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    drawn: dict[str, frozenset[str]] = {}
    for part, table in re.findall(r"```arrows (\w*)\n(.*?)```", text, re.DOTALL):
        for line in table.splitlines():
            room, arrow, others = line.partition("->")
            assert arrow, line
            prefix = "" if part == "parts" else f"{part}."
            drawn[prefix + room.strip()] = frozenset(prefix + name for name in others.split())
    return drawn


def test_the_walk_sees_the_whole_house() -> None:
    count = {part: sum(_part(module) == part for module in MODULES) for part in PARTS}
    assert count["engines"] >= 55
    assert count["runtime"] >= 75
    assert count["export"] >= 60
    assert count["mini"] >= 20
    assert count["benchmarks"] >= 80
    assert len(FACES) >= 35


def test_no_folder_holds_more_than_twelve_modules() -> None:
    counts = {_relative(f): sum(p.name != "__init__.py" for p in f.glob("*.py")) for f in FOLDERS}
    assert {folder: count for folder, count in counts.items() if count > MOST_MODULES} == {}


def test_the_arrows_are_those_that_the_architecture_draws() -> None:
    there = {room: sorted(rooms) for room, rooms in _arrows().items() if rooms}
    assert there == {room: sorted(rooms) for room, rooms in _drawn().items()}


def test_no_arrow_runs_back() -> None:
    floors = {room: _chain(room) for room in _drawn() if "." in room}  # RecursionError on a circle
    longest = {part: max((chain for room, chain in floors.items() if _part(room) == part), key=len) for part in PARTS}
    for part, chain in longest.items():
        sys.stdout.write(f"{part}: {len(chain)} floors: {' -> '.join(chain)}\n")
    assert {part: len(chain) for part, chain in longest.items() if len(chain) > MOST_FLOORS} == {}


@cache
def _chain(room: str) -> tuple[str, ...]:
    """Return the longest chain of arrows from `room`."""
    below = [_chain(name) for name in _drawn().get(room, ())]
    return (room, *max(below, key=len, default=()))


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: {t for t in _targets(path.read_text(encoding="utf-8")) if t != module and t not in PACKAGES}
             for module, path in MODULES.items() if module not in PACKAGES}  # fmt: skip
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"a circle: {' -> '.join((*above, module))}"
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


FORBIDDEN = {
    "engines": {"sdxl_trt", "runtime", "server", "export", "mini", "benchmarks"},
    "runtime": {"sdxl_trt", "server", "export", "benchmarks"},
    "export": {"sdxl_trt", "runtime", "server", "benchmarks"},
    "server": {"sdxl_trt", "export", "mini", "benchmarks"},
    "mini": {"sdxl_trt", "engines", "runtime", "server", "export", "benchmarks"},
    "benchmarks": {"sdxl_trt"},
}


def _breaches(module: str, source: str) -> list[str]:
    """Return the imports of `module` that break a rule: an arrow between parts, a cli, or past a wing's face."""
    part, wing = _part(module), module if module in PACKAGES else module.rpartition(".")[0]
    found = []
    for name, imported in _imports(source):
        full = f"{name}.{imported}".removeprefix(".")
        target = full if full in MODULES else name
        home = target.rpartition(".")[0]
        if _part(target) in FORBIDDEN.get(part, set()):
            found.append(f"{target}: {part} never imports it")
        elif target.endswith(".cli") and wing != target and (part, target) != ("benchmarks", "export.cli"):
            found.append(f"{target}: nothing imports a command")
        elif target not in (*PACKAGES, LAZY) and home not in (wing, part):
            found.append(f"{target}: import it from {home}")
    return found


@pytest.mark.parametrize("path", PATHS, ids=_relative)
def test_other_wings_are_imported_from_their_faces(path: Path) -> None:
    assert _breaches(_module(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engines.plans.files", "from sdxl_trt.runtime.request import Request"),
        ("engines.plans.files", "def f():\n    import sdxl_trt.mini"),
        ("engines.plans.files", "from sdxl_trt import export_bundle"),
        ("engines.plans.files", "from sdxl_trt.engines.bundle.manifest import Manifest"),
        ("engines.plans.files", "from sdxl_trt.engines import cli"),
        ("runtime.vae.decode", "from sdxl_trt.export import export_bundle"),
        ("runtime.vae.decode", "from sdxl_trt.runtime.cli import main"),
        ("runtime.vae.decode", "from sdxl_trt.engines.errors import UsageError"),
        ("runtime.vae.decode", "from sdxl_trt.benchmarks.contest import run_bench"),
        ("runtime.vae.decode", "from sdxl_trt.runtime.images import files"),
        ("export.graph.trace", "import sdxl_trt.runtime.diffusion.noise as noise"),
        ("export.graph.trace", "from sdxl_trt.export import cli"),
        ("mini.pair", "from sdxl_trt.engines import UsageError"),
        ("benchmarks.cli", "from sdxl_trt import Pipeline"),
    ],
)
def test_a_wrong_import_would_be_found(module: str, source: str) -> None:
    assert _breaches(module, source)


def _exported(path: Path) -> list[str] | None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if [ast.unparse(target) for target in targets] == ["__all__"] and node.value is not None:
                return list(ast.literal_eval(node.value))
    return None


def _rank(name: str) -> tuple[int, str]:
    """Return ruff's order: constants, classes, functions."""
    plain = name.strip("_")
    return (2 if name.startswith("__") else 0 if name.isupper() else 1 if plain[0].isupper() else 2), name


@pytest.mark.parametrize("path", PATHS, ids=_relative)
def test_all_is_sorted_and_without_doubles(path: Path) -> None:
    names = _exported(path)
    if names is None:
        assert path.name == "__init__.py", "a module states what it exports"
        return
    assert names == sorted(set(names), key=_rank)


@pytest.mark.parametrize("path", PATHS, ids=_relative)
def test_all_names_what_is_there(path: Path) -> None:
    source = ast.parse(path.read_text(encoding="utf-8"))
    bound = {node.id for node in ast.walk(source) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    defined = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    bound |= {node.name for node in ast.walk(source) if isinstance(node, defined)}
    bound |= {
        alias.asname or alias.name
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(_exported(path) or ()) <= bound


@pytest.mark.parametrize("path", FACES, ids=_relative)
def test_a_face_is_short_and_hides_no_module(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_FACE_LINES
    assert ast.get_docstring(ast.parse(text)), "a wing has one sentence"
    modules = {name for name in (_module(p).rpartition(".")[2] for p in path.parent.rglob("*.py")) if name}
    here = {p.stem for p in path.parent.glob("*.py")} | {p.name for p in path.parent.iterdir() if p.is_dir()}
    assert set(_exported(path) or ()) & here & (modules | here) == set(), "the module could no longer be imported"


NAMES = """
import importlib, sys
for face in {faces!r}:
    module = importlib.import_module(face)
    for name in getattr(module, "__all__", ()):
        getattr(module, name)
    try:
        module.no_such_name
    except AttributeError as exc:
        assert "no_such_name" in str(exc)
print("read", len({faces!r}))
"""


def test_every_name_of_a_face_can_be_imported() -> None:
    faces = ["sdxl_trt" + (f".{name}" if name else "") for name in sorted(PACKAGES)]
    done = _python(NAMES.format(faces=[face for face in faces if "contestants" not in face]))
    assert done.stdout == f"read {len(faces) - 1}\n", done.stderr


BLOCK = """
import importlib, sys
for name in {heavy!r}:
    sys.modules[name] = None
for name in {names!r}:
    importlib.import_module(name)
from sdxl_trt.runtime import Pipeline, Picture, Request, Step, open_bundle
print("imported", len({names!r}))
"""


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def _module_names(part: str) -> list[str]:
    return [PREFIX + module for module in MODULES if _part(module) == part and "__main__" not in module]


def test_engines_and_runtime_import_without_torch() -> None:
    names = _module_names("engines") + _module_names("runtime")
    assert len(names) > 130
    done = _python(BLOCK.format(heavy=HEAVY, names=names))
    assert done.stdout == f"imported {len(names)}\n", done.stderr


def test_a_module_that_needs_torch_would_be_found() -> None:
    done = _python(BLOCK.format(heavy=HEAVY, names=["sdxl_trt.export.checkpoints.checkpoint"]))
    assert done.returncode == 1
    assert "torch" in done.stderr


POSIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "select", "selectors", "termios", "tty"}
"""Modules that Windows lacks; select and selectors are there, and take only sockets."""
POSIX_NAMES = {
    "os": {
        "O_CLOEXEC", "O_DIRECT", "O_DIRECTORY", "O_NOFOLLOW", "O_TMPFILE", "WNOHANG", "chown", "copy_file_range",
        "fchmod", "fchown", "fork", "getegid", "geteuid", "getgid", "getloadavg", "getpgid", "getpgrp", "getuid",
        "killpg", "lchown", "memfd_create", "mkfifo", "nice", "posix_fadvise", "posix_fallocate", "pread", "preadv",
        "pwrite", "pwritev", "sched_getaffinity", "sched_setaffinity", "sendfile", "setpgid", "setsid", "statvfs",
        "sysconf", "uname", "wait", "wait3", "wait4",
    },
    "signal": {"SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGUSR1", "SIGUSR2",
               "alarm", "pause", "pthread_sigmask", "setitimer", "sigwait"},
    "Path": {"is_mount"},
}  # fmt: skip
POSIX_ARGUMENTS = {"pass_fds", "preexec_fn", "process_group"}


def _posix_only(source: str) -> list[str]:
    """Return what `source` uses that Windows lacks, except in a function that asks for the platform or the name."""
    tree, lines = ast.parse(source), source.splitlines()
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and re.search(r"sys\.platform|hasattr\(os,", "\n".join(lines[node.lineno : node.end_lineno]))
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            found += [name for name in names if name in POSIX_MODULES]
        elif isinstance(node, ast.keyword) and node.arg in POSIX_ARGUMENTS:
            found.append(node.arg)
        elif isinstance(node, ast.Attribute) and id(node) not in guarded:
            of = node.value.id if isinstance(node.value, ast.Name) else ""
            module = of if of in ("os", "signal") else "Path"
            found += [f"{of}.{node.attr}"] if node.attr in POSIX_NAMES[module] else []
    return found


def test_what_windows_lacks_is_asked_for_first() -> None:
    found = {_relative(path): _posix_only(path.read_text(encoding="utf-8")) for path in PATHS}
    assert {name: uses for name, uses in found.items() if uses} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import fcntl", "from selectors import DefaultSelector", "subprocess.Popen(command, pass_fds=(3,))",
        "def f():\n    os.killpg(1, 9)", "child.send_signal(signal.SIGKILL)", "out.is_mount()",
        "def f():\n    return os.getuid() if posix else 0",
    ],
)  # fmt: skip
def test_a_use_of_what_windows_lacks_would_be_found(source: str) -> None:
    assert _posix_only(source)
