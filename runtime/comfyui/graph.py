"""Read a stored ComfyUI graph: API JSON, a request's body, the editor's JSON, or a picture that carries one of these.

The file is not trusted: its size is capped before it is read, the type of every value is checked when the value is
used, and no path in it is opened here.
"""

__all__ = ["MAX_BYTES", "Graph", "graph_of", "read_graph"]

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.host import STDIN, read_capped
from sdxl_trt.runtime.comfyui.editor import from_editor
from sdxl_trt.runtime.comfyui.node import Link, Node
from sdxl_trt.runtime.comfyui.nodes import PRIMITIVES
from sdxl_trt.runtime.images import EDITOR, WORKFLOW, read_texts

MAX_BYTES = 16 << 20
MAX_NODES = 10_000
_PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
_BODIES = ("prompt", "input", "output", "workflow")
"""Keys of a request's body that hold a graph: of ComfyUI, of RunPod and the like, and of the editor's API export."""
_DEEPEST_BODY = 3
_MOST_PRIMITIVES = 10


@dataclass(frozen=True)
class Graph:
    """The nodes of a workflow by id; the values of primitive nodes are copied into the inputs that they feed."""

    nodes: Mapping[str, Node]

    def node(self, link: Link) -> Node:
        """Return the node that a link comes from. Raises UsageError if it is missing."""
        found = self.nodes.get(link.node)
        if found is None:
            raise UsageError(f"the workflow links to node {link.node[:20]}, which is missing or muted")
        return found

    def api(self, ends: Iterable[str]) -> dict[str, Any]:
        """Return the nodes with ids `ends` and all nodes that feed them, in the API form that ComfyUI runs."""
        kept: dict[str, Any] = {}
        waiting = list(ends)
        while waiting:
            node = self.nodes.get(waiting.pop())
            if node is None or node.id in kept:
                continue
            inputs = node.inputs.items()
            waiting += [value.node for _, value in inputs if isinstance(value, Link)]
            stored = {name: [value.node, value.slot] if isinstance(value, Link) else value for name, value in inputs}
            kept[node.id] = {"class_type": node.kind, "inputs": stored}
        return {key: kept[key] for key in self.nodes if key in kept}


def read_graph(path: Path) -> Graph:
    """Return the graph in a JSON file or in a picture's metadata; ``-`` is standard input. Raises UsageError."""
    if _is_picture(path):
        return _from_picture(path, str(path))
    content = read_capped(path, MAX_BYTES, "--workflow")
    return _from_picture(content, str(path)) if content.startswith(_PICTURES) else parse_graph(content, str(path))


def _is_picture(path: Path) -> bool:
    if path == STDIN:
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(_PICTURES[0])).startswith(_PICTURES)
    except (OSError, ValueError):
        return False  # the read that follows reports the error


def _from_picture(picture: Path | bytes, where: str) -> Graph:
    """Return the graph in a picture's texts: `prompt`, which ComfyUI ran, or else `workflow`, from its editor."""
    texts = read_texts(picture)
    for name in (WORKFLOW, EDITOR):
        text = texts.get(name, "").strip()
        if text not in ("", "{}", "null"):
            return parse_graph(text, where)
    raise UsageError(f"--workflow {where}: the picture carries no ComfyUI workflow; give the JSON file")


def parse_graph(content: str | bytes, where: str) -> Graph:
    """Return the graph in a JSON text, in API or editor form. Raises UsageError that names the source `where`."""
    try:
        stored = json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"--workflow {where}: not a JSON file ({str(exc)[:100]})") from exc
    found = next(_graphs(stored, _DEEPEST_BODY), None)
    if found is None:
        raise UsageError(f"--workflow {where}: neither ComfyUI's API format nor its editor's; export it from ComfyUI")
    if not isinstance(found.get("nodes"), list):
        return graph_of(found, f"--workflow {where}")
    _check_count(len(found["nodes"]), f"--workflow {where}")
    nodes = from_editor(found, where)
    if len(nodes) > MAX_NODES:
        raise UsageError(f"--workflow {where}: {len(nodes)} nodes including its subgraphs', more than {MAX_NODES}")
    return _filled(nodes)


def graph_of(stored: Mapping[str, Any], where: str) -> Graph:
    """Return the graph of nodes in API form, {id: {"class_type", "inputs"}}, which `where` names in messages.

    Raises UsageError for a value that is no node, and for too many of them.
    """
    _check_count(len(stored), where)
    if not stored or not all(map(_is_node, stored.values())):
        raise UsageError(f"{where}: is not a graph in ComfyUI's API format; every node needs a class_type")
    return _filled({key: _from_api(key, value) for key, value in stored.items()})


def _check_count(count: int, where: str) -> None:
    if count > MAX_NODES:
        raise UsageError(f"{where}: {count} nodes, more than {MAX_NODES}")


def _filled(nodes: Mapping[str, Node]) -> Graph:
    return Graph({key: _with_primitives(node, nodes) for key, node in nodes.items()})


def _graphs(stored: Any, depth: int) -> Iterator[dict[str, Any]]:
    """Yield the graphs in a JSON value: the value itself, or else those in the body of a request."""
    if not isinstance(stored, dict) or not stored:
        return
    if isinstance(stored.get("nodes"), list) or all(_is_node(value) for value in stored.values()):
        yield stored
    elif depth:
        for name in _BODIES:
            yield from _graphs(stored.get(name), depth - 1)


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("class_type"), str)


def _from_api(key: str, stored: dict[str, Any]) -> Node:
    inputs = stored.get("inputs")
    inputs = inputs if isinstance(inputs, dict) else {}
    return Node(key, stored["class_type"], {name: _linked(value) for name, value in inputs.items()})


def _linked(value: Any) -> Any:
    """Return a Link for ``[node id, output slot]``, else the value."""
    pair = isinstance(value, list) and len(value) == 2
    if pair and isinstance(value[0], str | int) and isinstance(value[1], int):
        return Link(str(value[0]), value[1])
    return value


def _with_primitives(node: Node, nodes: Mapping[str, Node]) -> Node:
    """Return `node` with the values of the primitive nodes that feed it; a circle of primitives stays a link."""
    values: dict[str, Any] = {}
    held: dict[str, str] = {}
    for name, value in node.inputs.items():
        feeding = nodes.get(value.node) if isinstance(value, Link) else None
        for _ in range(_MOST_PRIMITIVES):
            if feeding is None or feeding.kind not in PRIMITIVES or "value" not in feeding.inputs:
                break
            values[name], held[name] = feeding.inputs["value"], str(feeding)
            inner = values[name]
            feeding = nodes.get(inner.node) if isinstance(inner, Link) else None
    return replace(node, inputs={**node.inputs, **values}, held=held) if values else node
