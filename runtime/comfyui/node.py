"""What a node of a ComfyUI graph is, and what a class of nodes takes."""

__all__ = ["REQUIRED", "Input", "Link", "Node", "NodeKind"]

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

REQUIRED = object()
"""The default of an input that has to be stated."""


@dataclass(frozen=True)
class Link:
    """An input that comes from output `slot` of another node."""

    node: str
    slot: int


@dataclass(frozen=True)
class Node:
    """A node: its id, its class, and its inputs, each a value or a Link; `subgraph` is the name of the one it is in.

    `held` says of values that primitive nodes hold in which of them they stand.
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
        """Return where the value of an input stands: here, or in the primitive node that feeds it."""
        return f"{self.held[name]}, which feeds {name} of {self}: its value" if name in self.held else f"{self}: {name}"


@dataclass(frozen=True)
class Input:
    """An input: a link of a type in capitals, or a value: INT, FLOAT, STRING, or CHOICE of `choices`.

    `followed` says what is done with it, for the docs; `unread` what is said where it is stated and is not followed.
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
        """Return whether it takes a link alone."""
        return self.type not in ("INT", "FLOAT", "STRING", "CHOICE")


@dataclass(frozen=True)
class NodeKind:
    """A class of nodes: its inputs in ComfyUI's order, the types of its outputs, and its widgets in the editor's.

    Among the widgets "*" is one that is no input: what a seed does after a run, an upload's button.
    """

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    button: str = ""
    """The input after whose widget the editor keeps one more."""

    @property
    def widgets(self) -> tuple[str, ...]:
        """Return the names of the widgets in the order in which the editor keeps their values."""
        names: list[str] = []
        for each in self.inputs:
            if not each.is_link:
                names += [each.name, "*"] if each.name == self.button else [each.name]
        return tuple(names)

    def input(self, name: str) -> Input:
        """Return the input called `name`."""
        return next(each for each in self.inputs if each.name == name)
