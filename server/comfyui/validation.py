"""What ComfyUI checks of a graph before it queues it, with its types of errors; what is ours is checked afterwards.

The order is ComfyUI's: first that every class of nodes is known, then each output with all nodes that feed it.
"""

__all__ = ["Fault", "NodeFaults", "PromptError", "check_nodes", "outputs_of", "refusal", "with_texts"]

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdxl_trt.runtime.comfyui import NODES, Input
from sdxl_trt.runtime.diffusion.samplers import sampler_names
from sdxl_trt.runtime.diffusion.schedules import COMFYUI_SCHEDULES

Nodes = Mapping[str, Any]
OUTPUTS = ("SaveImage", "PreviewImage")
PRIMITIVES = ("PrimitiveInt", "PrimitiveFloat", "PrimitiveString", "PrimitiveStringMultiline")
_SHOWN, _LONGEST = 60, 500


@dataclass(frozen=True)
class Fault:
    """What is wrong, by one of ComfyUI's types."""

    type: str
    message: str
    details: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """Return it as ComfyUI does."""
        return {
            "type": self.type,
            "message": self.message,
            "details": self.details[:_LONGEST],
            "extra_info": self.extra,
        }


@dataclass(frozen=True)
class NodeFaults:
    """What is wrong with one node, and the outputs that are not drawn for it."""

    class_type: str
    faults: Sequence[Fault]
    outputs: Sequence[str]

    def told(self) -> dict[str, Any]:
        """Return it as ComfyUI does."""
        return {"errors": [each.told() for each in self.faults], "dependent_outputs": [*self.outputs],
                "class_type": self.class_type}  # fmt: skip


def refusal(fault: Fault, nodes: Mapping[str, NodeFaults] | None = None) -> dict[str, Any]:
    """Return the body of an answer that is not 200."""
    return {"error": fault.told(), "node_errors": {key: each.told() for key, each in (nodes or {}).items()}}


class PromptError(Exception):
    """A graph that is refused, with what is wrong with its nodes."""

    def __init__(self, fault: Fault, nodes: Mapping[str, NodeFaults] | None = None) -> None:
        super().__init__(fault.message)
        self.fault, self.nodes = fault, dict(nodes or {})


def outputs_of(nodes: Nodes, wanted: Collection[str] | None = None) -> list[str]:
    """Return the ids of the nodes that show pictures, or of those among `wanted`.

    Raises PromptError if there is none, and for a node that is none, or of a class that is not supported.
    """
    for key, node in nodes.items():
        kind = node.get("class_type") if isinstance(node, dict) else None
        about = {"node_id": key[:_SHOWN], "class_type": str(kind)[:_SHOWN], "node_title": str(kind)[:_SHOWN]}
        if not isinstance(kind, str):
            raise PromptError(Fault("invalid_prompt", "Cannot execute because a node is missing the class_type"
                                    " property.", f"Node ID '#{key[:_SHOWN]}'", about))  # fmt: skip
        if kind not in NODES:
            raise PromptError(Fault("missing_node_type", f"Node '{kind[:_SHOWN]}' not found. This server has the nodes"
                                    " that it can draw with; replace or remove it.", f"Node ID '#{key[:_SHOWN]}'",
                                    about))  # fmt: skip
        if not isinstance(node.get("inputs", {}), dict):
            raise PromptError(Fault("invalid_prompt", "The inputs of a node are not an object.",
                                    f"Node ID '#{key[:_SHOWN]}'", about))  # fmt: skip
    found = [key for key, node in nodes.items() if node["class_type"] in OUTPUTS and (wanted is None or key in wanted)]
    if not found:
        raise PromptError(Fault("prompt_no_outputs", "Prompt has no outputs"))
    return found


def with_texts(nodes: Nodes) -> tuple[dict[str, Any], list[str]]:
    """Return the graph with "" for every prompt that is null, and a warning for each: ComfyUI reads "None" there."""
    filled: dict[str, Any] = {}
    warnings: list[str] = []
    for key, node in nodes.items():
        inputs = node.get("inputs", {})
        empty = [name for name, value in inputs.items() if value is None and name.startswith("text")]
        filled[key] = {**node, "inputs": inputs | dict.fromkeys(empty, "")} if empty else node
        warnings += [f"node {key[:20]}: {name} is null, and is read as an empty text" for name in empty]
    return filled, warnings


def check_nodes(nodes: Nodes, outputs: Sequence[str]) -> dict[str, NodeFaults]:
    """Return what is wrong with the nodes that `outputs` need, by node; nodes that are fine are left out."""
    faults: dict[str, list[Fault]] = {}
    needed: dict[str, list[str]] = {}
    for output in outputs:
        reached, circle = _reached(nodes, output)
        for key in reached:
            needed.setdefault(key, []).append(output)
            if key not in faults:
                faults[key] = _faults_of(nodes, nodes[key])
        if circle:
            faults[output] = [*faults[output], Fault("dependency_cycle", "Dependency cycle detected", circle[:_SHOWN])]
    return {key: NodeFaults(nodes[key]["class_type"], found, needed[key]) for key, found in faults.items() if found}


def _links(node: Mapping[str, Any]) -> list[str]:
    return [str(value[0]) for value in node.get("inputs", {}).values() if _is_link(value)]


def _is_link(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int)
        and isinstance(value[1], int) and not isinstance(value[1], bool)
    )  # fmt: skip


def _reached(nodes: Nodes, output: str) -> tuple[list[str], str]:
    """Return the nodes that feed an output, itself first, and a node of a circle of links, "" if there is none."""
    done: dict[str, None] = {}
    open_now: set[str] = set()
    circle = ""
    stack = [(output, False)]
    while stack:
        key, leaves = stack.pop()
        if leaves:
            open_now.discard(key)
            continue
        if key in open_now:
            circle = circle or key
        if key in done or key not in nodes:
            continue
        done[key] = None
        open_now.add(key)
        stack += [(key, True), *((each, False) for each in _links(nodes[key]))]
    return [*done], circle


def _faults_of(nodes: Nodes, node: Mapping[str, Any]) -> list[Fault]:
    inputs = node.get("inputs", {})
    found = [_fault(nodes, each, inputs) for each in NODES[node["class_type"]].inputs]
    return [each for each in found if each is not None]


def _fault(nodes: Nodes, known: Input, inputs: Mapping[str, Any]) -> Fault | None:
    """Return what is wrong with an input, None if nothing is."""
    if inputs.get(known.name) is None:
        # Where ComfyUI's editor states a default, a graph that leaves it out means that.
        needed = not known.optional and (known.is_link or known.required)
        missing = Fault("required_input_missing", "Required input is missing", known.name, {"input_name": known.name})
        return missing if needed else None
    value = inputs[known.name]
    if isinstance(value, list):
        return _link_fault(nodes, known, value)
    if known.is_link:
        return Fault("bad_linked_input", "Bad linked input, must be a length-2 list of [node_id, slot_index]",
                     known.name, _about(known, value))  # fmt: skip
    return _value_fault(known, value)


def _link_fault(nodes: Nodes, known: Input, value: list[Any]) -> Fault | None:
    if not _is_link(value) or str(value[0]) not in nodes:
        return Fault("bad_linked_input", "Bad linked input, must be a length-2 list of [node_id, slot_index]",
                     known.name, _about(known, value))  # fmt: skip
    kind = nodes[str(value[0])]["class_type"]
    gives = NODES[kind].outputs
    received = gives[value[1]] if 0 <= value[1] < len(gives) else "nothing"
    if received == known.type or (kind in PRIMITIVES and not known.is_link):
        return None
    details = f"{known.name}, received_type({received}) mismatch input_type({known.type})"
    return Fault("return_type_mismatch", "Return type mismatch between linked nodes", details, _about(known, value))


def _value_fault(known: Input, value: Any) -> Fault | None:
    if known.type in ("INT", "FLOAT"):
        return _number_fault(known, value)
    if known.type == "BOOLEAN":
        return None if isinstance(value, bool) else _invalid(known, value)
    if isinstance(value, bool | dict):
        return _invalid(known, value)
    choices = {"sampler_name": sampler_names(comfyui=True), "scheduler": COMFYUI_SCHEDULES}.get(
        known.name, known.choices
    )
    if choices and str(value) not in choices:
        shown = f"{known.name}: '{str(value)[:_SHOWN]}' not in {[*choices]}"
        return Fault("value_not_in_list", "Value not in list", shown, _about(known, value))
    return None


def _number_fault(known: Input, value: Any) -> Fault | None:
    try:
        if isinstance(value, bool | dict):
            return _invalid(known, value)
        number = int(value) if known.type == "INT" else float(value)
    except (ValueError, OverflowError):
        return _invalid(known, value)
    if number != number:  # noqa: PLR0124 - not a number
        return _invalid(known, value)
    if number < known.low:
        return Fault("value_smaller_than_min", f"Value {_short(number)} smaller than min of {known.low}", known.name,
                     _about(known, value))  # fmt: skip
    if number > known.high:
        return Fault("value_bigger_than_max", f"Value {_short(number)} bigger than max of {known.high}", known.name,
                     _about(known, value))  # fmt: skip
    return None


def _short(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)[:_SHOWN]


def _invalid(known: Input, value: Any) -> Fault:
    return Fault("invalid_input_type", f"Failed to convert an input value to a {known.type} value",
                 f"{known.name}, {str(value)[:_SHOWN]}", _about(known, value))  # fmt: skip


def _about(known: Input, value: Any) -> dict[str, Any]:
    return {"input_name": known.name, "received_value": str(value)[:_SHOWN]}
