"""Result files (JSON with a Markdown table beside it), package versions, and the options of every measurement."""

__all__ = [
    "RESULTS_FOLDER",
    "machine_words",
    "package_versions",
    "results_parser",
    "write_json",
    "write_results",
    "write_text",
]

import argparse
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from sdxl_trt.engines.host import atomic_write

RESULTS_FOLDER = Path(__file__).parents[1] / "results"
"""Where results are checked in."""


def results_parser(prog: str, about: str | None, *, work: Path, results: Path, case: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every measurement; `case` is what --only selects."""
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=about)
    parser.add_argument("--work", type=Path, default=work, help="folder for intermediate files; kept for the next run")
    parser.add_argument("--results", type=Path, default=results, help="JSON file to write; the table goes beside it")
    parser.add_argument("--quick", action="store_true", help="tiny models: tests the benchmark in minutes")
    only = f"measure this {case.lower()} only; repeatable"
    parser.add_argument("--only", action="append", default=[], metavar=case.upper(), help=only)
    return parser


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the version of each distribution, or "not installed"."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine_words(machine: Mapping[str, str | int]) -> str:
    """Return the facts of a machine (`processes.machine`) in one line."""
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def write_results(report: msgspec.Struct, table: str, path: Path) -> None:
    """Write `report` to `path` as JSON and its `table` beside it as Markdown."""
    write_json(report, path)
    write_text(table, path.with_suffix(".md"))


def write_json(report: msgspec.Struct, path: Path) -> None:
    """Write `report` to `path` as indented JSON, atomically."""
    _write(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n", path)


def write_text(text: str, path: Path) -> None:
    """Write `text` to `path` in UTF-8, atomically."""
    _write(text.encode(), path)


def _write(data: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(data)
