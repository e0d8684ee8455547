"""Every command for Python that a page or the Makefile names is there, and has the options that it is given."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRACKED = subprocess.run(
    ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.split()
PAGES = [
    "Makefile",
    *(page for page in TRACKED if page != "CHANGELOG.md" and not page.startswith("benchmarks/results/")),
]
COMMAND = re.compile(r"python3? (?:-m (sdxl_trt[\w.]*)|(examples/\w+\.py))((?:[^`\n]|\\\n)*)")
NAMED = [(page, *found) for page in PAGES for found in COMMAND.findall((ROOT / page).read_text(encoding="utf-8"))]
HELP = """
import contextlib, io, json, runpy, sys
told = {}
for name in sys.argv[1:]:
    sys.argv, said, code = [name, "--help"], io.StringIO(), None
    with contextlib.redirect_stdout(said):
        try:
            if name.endswith(".py"):
                runpy.run_path(name)
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as exc:
            code = exc.code
    told[name] = [code, said.getvalue()]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told() -> dict[str, tuple[int | None, str]]:
    """Return what each command said to --help, with its exit code; all run in one process, for torch's sake."""
    names = dict.fromkeys(module or example for _, module, example, _ in NAMED)
    done = subprocess.run([sys.executable, "-c", HELP, *names], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: (code, said) for name, (code, said) in json.loads(done.stdout.splitlines()[-1]).items()}


def test_the_pages_are_read() -> None:
    assert {page for page, *_ in NAMED} >= {"Makefile", "mini/MODEL_CARD.md", "docs/gpu.md", "docs/roofline.md"}
    assert len({module for _, module, _, _ in NAMED}) >= 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "module", "example", "rest"), NAMED, ids=[f"{each[0]}:{each[1] or each[2]}" for each in NAMED]
)
def test_a_command_on_a_page_has_help_and_its_options(
    page: str, module: str, example: str, rest: str, told: dict[str, tuple[int | None, str]]
) -> None:
    code, said = told[module or example]
    if example:
        assert code is None  # its functions are there; test_examples.py runs them
        return
    assert code == 0
    assert said.startswith("usage: ")
    assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)) <= set(re.findall(r"--[a-z][a-z-]*", said))
