"""A ComfyUI graph as it is stored: API JSON, the editor's JSON, or a picture that carries either.

Nothing of it is trusted: sizes are capped before reading, every value is checked for its type when it is asked for, and
no path in it is opened here.
"""

__all__ = ["Graph", "Link", "Node", "parse_graph", "read_graph"]

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_trt.engines.errors import UsageError, explain_os_error
from sdxl_trt.runtime.picture_files import WORKFLOW, read_texts

MAX_BYTES = 16 << 20
MAX_NODES = 10_000
MAX_NUMBER = 2**64
_PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
_MAX_HOPS = 100
# The editor stores a node's widget values in this order; "*" is the seed's own "after generating" choice.
_WIDGETS: dict[str, tuple[str, ...]] = {
    "CheckpointLoaderSimple": ("ckpt_name",),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "LoadImage": ("image", "*"),
    "RepeatLatentBatch": ("amount",),
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeSDXL": ("width", "height", "crop_w", "crop_h", "target_width", "target_height", "text_g", "text_l"),
    "CLIPTextEncodeSDXLRefiner": ("ascore", "width", "height", "text"),
    "KSampler": ("seed", "*", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": ("add_noise", "noise_seed", "*", "steps", "cfg", "sampler_name", "scheduler", "start_at_step",
                         "end_at_step", "return_with_leftover_noise"),
    "SaveImage": ("filename_prefix",),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
}  # fmt: skip
_MUTED, _BYPASSED = 2, 4


@dataclass(frozen=True)
class Link:
    """An input that comes from output `slot` of another node."""

    node: str
    slot: int


@dataclass(frozen=True)
class Node:
    """A node: its id, its class, and its inputs, each a value or a Link."""

    id: str
    kind: str
    inputs: Mapping[str, Any]

    def __str__(self) -> str:
        return f"node {self.id[:20]} ({self.kind[:60]})"

    def number(self, name: str, default: float | None = None) -> float:
        """Return a finite number; UsageError where there is none."""
        value = self.inputs.get(name, default)
        # Beyond every setting's range, and within what a float holds.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
            raise UsageError(f"{self}: {name} is no number, or a huge one")
        return value

    def whole(self, name: str, default: int | None = None) -> int:
        """Return a whole number; UsageError where there is none."""
        value = self.number(name, default)
        if value != int(value):
            raise UsageError(f"{self}: {name} is no whole number")
        return int(value)

    def text(self, name: str, default: str | None = None) -> str:
        """Return a string; UsageError where there is none."""
        value = self.inputs.get(name, default)
        if not isinstance(value, str):
            raise UsageError(f"{self}: {name} is no text")
        return value

    def link(self, name: str) -> Link:
        """Return the link that an input is fed by; UsageError where nothing is linked."""
        value = self.inputs.get(name)
        if not isinstance(value, Link):
            raise UsageError(f"{self}: nothing is linked to {name}")
        return value


@dataclass(frozen=True)
class Graph:
    """The nodes of a workflow by id."""

    nodes: Mapping[str, Node]

    def node(self, link: Link) -> Node:
        """Return the node that a link comes from; UsageError where it is missing."""
        found = self.nodes.get(link.node)
        if found is None:
            raise UsageError(f"the workflow links to node {link.node[:20]}, which is not in it")
        return found


def read_graph(path: Path) -> Graph:
    """Return the graph of a JSON file, or of the texts of a picture; UsageError where there is none."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as exc:
        raise explain_os_error(exc, f"--workflow {path}") from exc
    if content.startswith(_PICTURES):
        return parse_graph(_from_picture(path), str(path))
    if len(content) > MAX_BYTES:
        raise UsageError(f"--workflow {path}: larger than {MAX_BYTES >> 20} MiB, so not a workflow")
    return parse_graph(content, str(path))


def _from_picture(path: Path) -> str:
    """Return ComfyUI's text: `prompt`, what was run, or else `workflow`, what the editor showed."""
    texts = read_texts(path)
    found = texts.get(WORKFLOW) or texts.get("workflow")
    if not found:
        raise UsageError(f"--workflow {path}: the picture carries no ComfyUI workflow; give the JSON file")
    return found


def parse_graph(content: str | bytes, where: str) -> Graph:
    """Return the graph of a JSON text in either form. Raises UsageError, which calls it `where`."""
    try:
        stored = json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"--workflow {where}: not a JSON file ({str(exc)[:100]})") from exc
    editor = isinstance(stored, dict) and isinstance(stored.get("nodes"), list)
    count = len(stored["nodes"]) if editor else len(stored) if isinstance(stored, dict) else 0
    if count > MAX_NODES:
        raise UsageError(f"--workflow {where}: {count} nodes, more than {MAX_NODES}")
    if editor:
        graph = _from_editor(stored, where)
    elif isinstance(stored, dict) and stored and all(_is_node(value) for value in stored.values()):
        graph = {key: _from_api(key, value) for key, value in stored.items()}
    else:
        raise UsageError(f"--workflow {where}: neither ComfyUI's API format nor its editor's; export it from ComfyUI")
    return Graph(graph)


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


def _from_editor(stored: dict[str, Any], where: str) -> dict[str, Node]:
    """Return the nodes of the editor's form: links by number, widget values by position, helpers resolved away."""
    raw = [node for node in stored["nodes"] if isinstance(node, dict) and isinstance(node.get("type"), str)]
    nodes = {str(node.get("id")): node for node in raw}
    links = {
        link[0]: Link(str(link[1]), link[2])
        for link in (stored["links"] if isinstance(stored.get("links"), list) else [])
        if isinstance(link, list) and len(link) >= 5 and isinstance(link[0], int) and isinstance(link[2], int)
    }
    reader = _Editor(nodes, links, where)
    helpers = ("Reroute", "PrimitiveNode", "Note", "MarkdownNote")
    return {
        key: Node(key, node["type"], reader.inputs(node))
        for key, node in nodes.items()
        if node["type"] not in helpers and node.get("mode") not in (_MUTED, _BYPASSED)
    }


@dataclass(frozen=True)
class _Editor:
    nodes: dict[str, dict[str, Any]]
    links: dict[int, Link]
    where: str

    def inputs(self, node: dict[str, Any]) -> dict[str, Any]:
        values = node.get("widgets_values")
        if isinstance(values, dict):
            found = dict(values)
        else:
            names = _WIDGETS.get(node["type"], ())
            # A node that was saved without the seed's choice is shorter by it.
            listed = values if isinstance(values, list) else []
            if len(listed) < len(names):
                names = tuple(name for name in names if name != "*")
            found = dict(zip(names, listed, strict=False))
            found.pop("*", None)
        for slot in _dicts(node.get("inputs")):
            link = self._linked(slot)
            if link is not None and isinstance(slot.get("name"), str):
                found[slot["name"]] = self._resolved(link)
        return found

    def _resolved(self, link: Link) -> Any:
        """Follow reroutes and bypassed nodes to what feeds them; a primitive is its value."""
        for _ in range(_MAX_HOPS):
            node = self.nodes.get(link.node)
            if node is None:
                return link
            if node["type"] == "PrimitiveNode":
                values = node.get("widgets_values")
                return values[0] if isinstance(values, list) and values else None
            if node["type"] != "Reroute" and node.get("mode") != _BYPASSED:
                return link
            before = self._through(node, link.slot)
            if before is None:
                return None
            link = before
        raise UsageError(f"--workflow {self.where}: reroutes go in a circle")

    def _through(self, node: dict[str, Any], slot: int) -> Link | None:
        """Return the link into `node` of the same type as its output `slot`."""
        outputs, inputs = _dicts(node.get("outputs")), _dicts(node.get("inputs"))
        kind = outputs[slot].get("type") if 0 <= slot < len(outputs) else None
        fitting = [each for each in inputs if node["type"] == "Reroute" or each.get("type") == kind]
        return self._linked(fitting[0]) if fitting else None

    def _linked(self, slot: dict[str, Any]) -> Link | None:
        number = slot.get("link")
        return self.links.get(number) if isinstance(number, int) else None


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
