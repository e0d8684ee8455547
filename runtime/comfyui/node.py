"""A node of a ComfyUI graph, and the inputs and outputs of a node class."""

__all__ = ["REQUIRED", "IncompleteError", "Input", "Link", "Node", "NodeKind", "incomplete", "whole"]

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sdxl_trt.engines import UsageError

Found = TypeVar("Found")
REQUIRED = object()
"""The default of an input that must be given."""


@dataclass(frozen=True)
class Link:
    """An input that comes from output `slot` of another node."""

    node: str
    slot: int


@dataclass(frozen=True)
class Node:
    """A node: its id, its class, and its inputs, each a value or a Link; `subgraph` names the subgraph it is in.

    `held` names the primitive node that holds an input's value, by input name.
    """

    id: str
    kind: str
    inputs: Mapping[str, Any]
    subgraph: str = ""
    held: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        within = f" of subgraph {self.subgraph[:60]!r}" if self.subgraph else ""
        return f"node {self.id[:20]} ({self.kind[:60]}){within}"

    def place(self, name: str) -> str:
        """Return the place of an input's value, for messages: this node, or the primitive node that feeds the input."""
        return f"{self.held[name]}, which feeds {name} of {self}: its value" if name in self.held else f"{self}: {name}"


@dataclass(frozen=True)
class Input:
    """An input: a value (INT, FLOAT, STRING, BOOLEAN, or CHOICE of `choices`), or a link (all other types).

    `followed` describes for the docs how the input is used; `unread` is the warning for an input that is ignored.
    """

    name: str
    type: str
    default: Any = REQUIRED
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()
    followed: str = "as in ComfyUI"
    unread: str = ""

    @property
    def is_link(self) -> bool:
        """Return whether it takes only a link."""
        return self.type not in ("INT", "FLOAT", "STRING", "BOOLEAN", "CHOICE")

    @property
    def required(self) -> bool:
        """Return whether it has no default."""
        return self.default is REQUIRED

    @property
    def optional(self) -> bool:
        """Return whether ComfyUI runs the node without it."""
        return self.default is None


@dataclass(frozen=True)
class NodeKind:
    """A class of nodes: its inputs in ComfyUI's order, the types of its outputs, and its widgets in the editor's order.

    A widget called "*" is not an input: the seed's control_after_generate, or an upload button.
    """

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    button: str = ""
    """The input whose widget is followed by a "*" widget in the editor."""

    @property
    def widgets(self) -> tuple[str, ...]:
        """Return the names of the widgets in the order in which the editor stores their values."""
        names: list[str] = []
        for each in self.inputs:
            if not each.is_link:
                names += [each.name, "*"] if each.name == self.button else [each.name]
        return tuple(names)

    def input(self, name: str) -> Input:
        """Return the input called `name`."""
        return next(each for each in self.inputs if each.name == name)


class IncompleteError(UsageError):
    """A node cannot be read because one that feeds it cannot."""


def whole(found: Found | None, node: Node) -> Found:
    """Return `found`; raise if it is None, whose cause has been noted."""
    if found is None:
        raise incomplete(node)
    return found


def incomplete(node: Node) -> IncompleteError:
    """Return the error of a node whose cause has been noted."""
    return IncompleteError(f"{node}: cannot be run without what feeds it")
