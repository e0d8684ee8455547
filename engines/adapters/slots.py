"""The slots of a graph: the modules whose LoRAs enter as inputs, and the names and shapes of these inputs."""

__all__ = ["DOWN", "RANK", "UP", "Slot", "is_slot_input", "read_slots", "write_slots"]

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sdxl_trt.engines.bundle import Bundle, Component, Positive, Record, verify_file
from sdxl_trt.engines.errors import CorruptError, IncompatibleError, explain_os_error
from sdxl_trt.engines.host import atomic_write

DOWN, UP = ".lora_down", ".lora_up"
RANK = "rank"
"""The axis that all slots of a graph share: the sum of the ranks of a request's LoRAs."""


class Slot(Record, frozen=True, kw_only=True):
    """A linear layer or a convolution that takes LoRAs as inputs; `kernel` is a convolution's, () for a linear layer.

    `module` is its published name; `inputs` and `outputs` are the second and first size of its weight.
    """

    module: str
    inputs: Positive
    outputs: Positive
    kernel: tuple[Positive, ...] = ()

    @property
    def columns(self) -> int:
        """Return the second size of the weight as a matrix: inputs · kernel."""
        return self.inputs * math.prod(self.kernel)

    def shapes(self, adapters: int | str = 1, rank: int | str = RANK) -> dict[str, tuple[int | str, ...]]:
        """Return the shapes of its two inputs by name, ``lora_down`` first; see `export.graph.slots`."""
        if self.kernel:
            return {self.module + DOWN: (rank, self.columns), self.module + UP: (self.outputs, rank)}
        return {self.module + DOWN: (adapters, self.inputs, rank), self.module + UP: (adapters, rank, self.outputs)}


def is_slot_input(name: str) -> bool:
    """Return whether an input of a graph belongs to a slot."""
    return name.endswith((DOWN, UP))


def write_slots(path: Path, slots: Sequence[Slot]) -> None:
    """Write the list of a graph's slots as JSON, atomically."""
    with atomic_write(path) as file:
        file.write(msgspec.json.encode(slots))


def read_slots(bundle: Bundle, component: Component) -> tuple[Slot, ...]:
    """Return the slots of the component's slot graph, in the graph's order; the file's digest is checked.

    Raises IncompatibleError for a component of an older version, which has none; CorruptError for a damaged file.
    """
    record = component.slots
    if record is None:
        raise IncompatibleError(f"{bundle.root}: {component.source.name} was exported without slots for LoRAs by an"
                                " older version; export it again with export-engines --force")  # fmt: skip
    path = bundle.path(record)
    verify_file(path, record)
    try:
        return msgspec.json.decode(path.read_bytes(), type=tuple[Slot, ...])
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
    except msgspec.DecodeError as exc:
        raise CorruptError(f"{path}: is not a list of slots ({exc}); run export-engines again") from exc
