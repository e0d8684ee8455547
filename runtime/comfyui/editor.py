"""The JSON that ComfyUI's editor saves: links by number, widget values by position, subgraphs by reference.

It is converted to the nodes that the editor would send to the server: reroutes, primitives and bypassed nodes are
resolved, and subgraphs are expanded (``graphToPrompt`` and ``ExecutableNodeDTO`` of ComfyUI's frontend).
"""

__all__ = ["from_editor"]

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdxl_trt.engines import UsageError
from sdxl_trt.runtime.comfyui.node import Link, Node
from sdxl_trt.runtime.comfyui.nodes import NODES

_MUTED, _BYPASSED = 2, 4
_VIRTUAL = ("Reroute", "PrimitiveNode", "Note", "MarkdownNote")
_MOST_HOPS = 200
_DEEPEST = 8
_MOST_NODES = 10_000
_UNSET = object()
Stored = dict[str, Any]


@dataclass(frozen=True)
class _Scope:
    """The nodes and links of the graph itself, or of one instance of a subgraph within its `parent`.

    `prefix` starts the ids of its nodes, ``50:`` in instance 50; `name` is the subgraph's, "" for the graph itself.
    """

    nodes: Mapping[str, Stored]
    links: Mapping[int, Link]
    ends: Mapping[int, Link]
    """The links that feed the outputs of a subgraph, by output slot."""
    entry: str = ""
    """The id of the node that represents a subgraph's inputs."""
    prefix: str = ""
    name: str = ""
    parent: "_Scope | None" = None
    instance: Stored = field(default_factory=dict)
    inner: dict[str, "_Scope"] = field(default_factory=dict)
    """The scopes of the subgraph instances in it, by node id."""


def from_editor(stored: Stored, where: str) -> dict[str, Node]:
    """Return the nodes of the editor's JSON by id, those of subgraphs as ``instance:node``.

    Raises UsageError that names the file `where` for circular reroutes and for subgraphs that contain themselves.
    """
    raw = stored.get("definitions")
    definitions = {
        str(each.get("id")): each for each in _dicts(raw.get("subgraphs") if isinstance(raw, dict) else None)
    }
    scopes = [*_scopes(_scope(stored), definitions, where, 0)]
    resolver = _Resolver(where)
    found: dict[str, Node] = {}
    for scope in scopes:
        for key, node in scope.nodes.items():
            hidden = node["type"] in _VIRTUAL or node.get("mode") in (_MUTED, _BYPASSED) or key in scope.inner
            if not hidden:
                name = scope.prefix + key
                found[name] = Node(name, node["type"], resolver.inputs(scope, node), scope.name)
    return found


def _scopes(scope: _Scope, definitions: Mapping[str, Stored], where: str, depth: int) -> Iterator[_Scope]:
    """Yield a scope and the scopes of all active subgraphs in it."""
    if depth > _DEEPEST:
        raise UsageError(f"--workflow {where}: its subgraphs are nested deeper than {_DEEPEST}")
    total = len(scope.nodes)
    yield scope
    for key, node in scope.nodes.items():
        definition = definitions.get(node["type"])
        if definition is None or node.get("mode") in (_MUTED, _BYPASSED):
            continue
        inner = _scope(definition, scope, key, node)
        scope.inner[key] = inner
        for each in _scopes(inner, definitions, where, depth + 1):
            total += len(each.nodes)
            if total > _MOST_NODES:
                raise UsageError(f"--workflow {where}: more than {_MOST_NODES} nodes, including those of its subgraphs")
            yield each


def _scope(stored: Stored, parent: _Scope | None = None, key: str = "", instance: Stored | None = None) -> _Scope:
    nodes = {str(node.get("id")): node for node in _dicts(stored.get("nodes")) if isinstance(node.get("type"), str)}
    links: dict[int, Link] = {}
    ends: dict[int, Link] = {}
    exit_node = _id_of(stored.get("outputNode"))
    for number, link, target, slot in _links(stored.get("links")):
        links[number] = link
        if parent is not None and target == exit_node:
            ends[slot] = link
    if parent is None:
        return _Scope(nodes, links, ends)
    name = stored.get("name")
    called = name if isinstance(name, str) and name else "without a name"
    return _Scope(nodes, links, ends, _id_of(stored.get("inputNode")), f"{parent.prefix}{key}:", called, parent,
                  instance or {})  # fmt: skip


def _links(stored: Any) -> Iterator[tuple[int, Link, str, int]]:
    """Yield (number, origin, target node, target slot) of links, which are stored as lists or as objects."""
    for link in stored if isinstance(stored, list) else ():
        if isinstance(link, dict):
            link = [link.get(name) for name in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]  # noqa: PLW2901
        if isinstance(link, list) and len(link) >= 5 and all(isinstance(link[i], int) for i in (0, 2, 4)):
            yield link[0], Link(str(link[1]), link[2]), str(link[3]), link[4]


@dataclass(frozen=True)
class _Resolver:
    where: str

    def inputs(self, scope: _Scope, node: Stored) -> Stored:
        """Return a node's inputs by name: its widgets' values, each overridden by what is linked to the input."""
        found = _widgets(node)
        for slot in _dicts(node.get("inputs")):
            if isinstance(slot.get("name"), str):
                value = self._input(scope, slot, _type(slot), 0)
                if value is not _UNSET:
                    found[slot["name"]] = value
        return found

    def _input(self, scope: _Scope, slot: Stored, kind: str, hops: int) -> Any:
        """Return what feeds an input: a Link, a value, or _UNSET if nothing does."""
        if hops > _MOST_HOPS:
            raise UsageError(f"--workflow {self.where}: its reroutes form a circle")
        number = slot.get("link")
        link = scope.links.get(number) if isinstance(number, int) else None
        if link is None:
            return _UNSET
        if scope.parent is not None and link.node == scope.entry:
            return self._entry(scope, scope.parent, link.slot, kind, hops)
        return self._output(scope, link, kind, hops + 1)

    def _entry(self, scope: _Scope, parent: _Scope, number: int, kind: str, hops: int) -> Any:
        """Return what feeds input `number` of a subgraph from outside: a link, or a widget of its instance."""
        slots = _dicts(scope.instance.get("inputs"))
        if not 0 <= number < len(slots):
            return _UNSET
        slot = slots[number]
        value = self._input(parent, slot, kind, hops + 1)
        if value is not _UNSET or "widget" not in slot:
            return value
        widgets = [each for each in slots if "widget" in each]
        values = scope.instance.get("widgets_values")
        if isinstance(values, list) and len(values) == len(widgets):
            return values[widgets.index(slot)]
        if isinstance(values, list) and not values:
            return _UNSET  # the instance shows the inner widget's own value
        raise UsageError(f"node {scope.prefix[:-1]} (subgraph {scope.name[:60]!r}): its widget"
                         f" {str(slot.get('name'))[:40]!r} cannot be matched to a value; link it, or unpack the"
                         " subgraph")  # fmt: skip

    def _output(self, scope: _Scope, link: Link, kind: str, hops: int) -> Any:
        """Return what output `link` of a scope's node gives an input of type `kind`; _UNSET if nothing."""
        if hops > _MOST_HOPS:
            raise UsageError(f"--workflow {self.where}: its reroutes form a circle")
        node = scope.nodes.get(link.node)
        own = Link(scope.prefix + link.node, link.slot)
        # A link to a muted node is kept: ComfyUI then reports that the input is missing.
        if node is None or node.get("mode") == _MUTED:
            return own
        slots = _dicts(node.get("inputs"))
        if node.get("mode") == _BYPASSED:
            number = _bypass(slots, _dicts(node.get("outputs")), link.slot, kind)
            return _UNSET if number is None else self._input(scope, slots[number], _type(slots[number]), hops + 1)
        if link.node in scope.inner:
            return self._end(scope, scope.inner[link.node], link.slot, kind, hops + 1)
        if node["type"] == "Reroute":
            return self._input(scope, slots[0], kind, hops + 1) if slots else _UNSET
        values = node.get("widgets_values")
        if node["type"] == "PrimitiveNode":
            return values[0] if isinstance(values, list) and values else _UNSET
        return own

    def _end(self, scope: _Scope, inner: _Scope, slot: int, kind: str, hops: int) -> Any:
        """Return what output `slot` of a subgraph gives an input of type `kind`; _UNSET if nothing."""
        end = inner.ends.get(slot)
        if end is None:
            return _UNSET
        if end.node == inner.entry:
            return self._entry(inner, scope, end.slot, kind, hops)
        return self._output(inner, end, kind, hops)


def _bypass(inputs: list[Stored], outputs: list[Stored], slot: int, kind: str) -> int | None:
    """Return the input that a bypassed node passes to output `slot`, for an input of type `kind`; None if none fits.

    It is the input of the same number if the types match, else the first input of that type.
    """
    given = _type(outputs[slot]) if 0 <= slot < len(outputs) else ""
    wanted = kind or given
    if wanted == "*":
        return (slot if slot < len(inputs) else 0) if inputs else None
    fitting = [
        number for number, each in enumerate(inputs) if _agree(_type(each), given) and _agree(_type(each), wanted)
    ]
    if slot in fitting:
        return slot
    exact = [number for number, each in enumerate(inputs) if _type(each) == wanted]
    return next(iter([*exact, *fitting]), None)


def _agree(one: str, other: str) -> bool:
    """Return whether two types can be linked: "*" and "" match any type, a comma-separated list each type in it."""
    any_type = {"", "*"}
    if one in any_type or other in any_type:
        return True
    return bool({part.strip().lower() for part in one.split(",")} & {part.strip().lower() for part in other.split(",")})


def _widgets(node: Stored) -> Stored:
    """Return the values of a node's widgets by name; those of an unknown class have no names."""
    values = node.get("widgets_values")
    if isinstance(values, dict):
        return dict(values)
    kind = NODES.get(node["type"])
    names = kind.widgets if kind else ()
    # A node saved without the seed's control_after_generate has one value fewer.
    listed = values if isinstance(values, list) else []
    if len(listed) < len(names):
        names = tuple(name for name in names if name != "*")
    found = dict(zip(names, listed, strict=False))
    found.pop("*", None)
    # Values that a later version of the node adds are reported where its inputs are checked.
    beyond = listed[len(names) :] if kind else []
    return found | {f"widget {number}": value for number, value in enumerate(beyond, start=len(names) + 1)}


def _type(slot: Stored) -> str:
    kind = slot.get("type")
    return kind if isinstance(kind, str) else ""


def _id_of(stored: Any) -> str:
    return str(stored.get("id")) if isinstance(stored, dict) else ""


def _dicts(value: Any) -> list[Stored]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
