"""The table of nodes: the docs show the table of the code, and every input is used or named in a warning."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sdxl_trt.engines
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.comfyui.node import REQUIRED, Input
from sdxl_trt.runtime.comfyui.nodes import NODES
from sdxl_trt.runtime.comfyui.reader import read_workflow

DOCS = Path(sdxl_trt.engines.__file__).parent.parent / "docs" / "comfyui.md"
LINKS = ("MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "IMAGE", "MASK")
Json = Any
GRAPH: dict[str, tuple[str, dict[str, Any]]] = {
    key: (node["class_type"], node["inputs"])
    for key, node in json.loads((Path(__file__).parents[2] / "comfyui" / "every_node.json").read_text()).items()
}
"""Every class of the table: nodes 38, 57, 114, 123 and 135 end pictures, 60 to 64 and 140 are for other links."""
OTHER_LINKS = {"MODEL": ["60", 0], "CLIP": ["60", 1], "VAE": ["61", 0], "CONDITIONING": ["62", 0],
               "LATENT": ["63", 0], "IMAGE": ["64", 0], "CONTROL_NET": ["65", 0], "MASK": ["140", 0]}  # fmt: skip
INPUTS = [(kind, each.name) for kind, node in NODES.items() for each in node.inputs]


def _other(known: Input, value: Any) -> Any:
    """Return another value that ComfyUI accepts."""
    if known.is_link:
        return OTHER_LINKS[known.type]
    if known.type == "CHOICE":
        return next(choice for choice in known.choices if choice != value)
    if known.type == "STRING":
        return f"{value} too"
    if known.type == "BOOLEAN":
        return not value
    number = value if isinstance(value, int | float) else 1
    step = (64 if known.name in ("width", "height") else 1) if known.type == "INT" else 0.125
    return number + step if number + step <= known.high else number - step


def _row(name: str) -> str:
    node = NODES[name]
    inputs = [
        f"`{each.name}`" + ("" if each.followed == "as in ComfyUI" else f" ({each.followed})") for each in node.inputs
    ]
    return f"| {name} | {', '.join(inputs)} |"


def test_the_docs_have_the_table_of_the_code() -> None:
    table = "\n".join(["| node | inputs |", "|---|---|", *map(_row, NODES)])
    assert table in DOCS.read_text(encoding="utf-8"), f"docs/comfyui.md must contain this table:\n{table}"


def test_every_class_of_the_table_is_in_the_graph() -> None:
    assert {kind for kind, _ in GRAPH.values()} == set(NODES)


@pytest.fixture
def read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[[Json], tuple[Any, tuple[str, ...]]]:
    """Return a function that reads a graph and returns its pictures and the printed lines, or the error."""

    def load(graph: Json) -> tuple[Any, tuple[str, ...]]:
        caplog.clear()
        path = tmp_path / "graph.json"
        stored = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in graph.items()}
        path.write_text(json.dumps(stored))
        with caplog.at_level(logging.WARNING):
            try:
                # A preview is read if nothing is saved.
                return read_workflow(path).outputs, tuple(record.getMessage() for record in caplog.records)
            except UsageError as exc:
                return str(exc), ()

    return load


@pytest.mark.parametrize(("kind", "name"), INPUTS, ids=[f"{kind}.{name}" for kind, name in INPUTS])
def test_no_input_is_ignored_silently(read: Any, kind: str, name: str) -> None:
    key = next(key for key, (each, _) in GRAPH.items() if each == kind)
    graph = copy.deepcopy(GRAPH)
    if int(key) >= 50 or kind == "VAELoader":  # of the second picture: a preview, which is read only if it is alone
        del graph["38"]
    before = read(graph)
    assert not isinstance(before[0], str), before[0]
    known = NODES[kind].input(name)
    graph[key][1][name] = _other(known, graph[key][1].get(name, known.default))
    changed = read(graph)
    assert changed != before
    if known.default is REQUIRED:
        del graph[key][1][name]
        assert f"node {key} ({kind})" in str(read(graph)) or "PrimitiveInt" in str(read(graph)) or "Primitive" in kind


@pytest.mark.parametrize("kind", NODES)
def test_an_unknown_input_is_named(read: Any, kind: str) -> None:
    key = next(key for key, (each, _) in GRAPH.items() if each == kind)
    graph = copy.deepcopy(GRAPH)
    if int(key) >= 50 or kind == "VAELoader":
        del graph["38"]
    if kind.startswith("Primitive"):
        return  # their values are copied into the nodes that they feed
    graph[key][1]["brand_new"] = 1
    assert f"node {key} ({kind}): brand_new: unknown input" in "\n".join(read(graph)[1])
