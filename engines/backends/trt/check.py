"""Compare a deserialized plan with its record in the manifest, before it runs."""

__all__ = ["check_engine"]

from collections.abc import Iterable, Mapping
from typing import Any

from sdxl_trt.engines.bundle import Component, DType, PlanRecord, Shape, Slot, TensorSpec, slot_dtype
from sdxl_trt.engines.errors import IncompatibleError
from sdxl_trt.engines.plans import rank_range

_TYPES: dict[DType, str] = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64"}


def check_engine(engine: Any, component: Component, record: PlanRecord, slots: Mapping[str, Slot]) -> None:
    """Raise IncompatibleError unless `engine` has the tensors of `component` and the profiles of `record`.

    `slots`, by module, are those of a plan for LoRAs; their inputs count as the component's.
    """
    found = _tensors(engine)
    ranked = _slot_shapes(slots.values(), record)
    expected = _expected(component.inputs, "INPUT") | _expected(component.outputs, "OUTPUT")
    expected |= dict.fromkeys(ranked, ("INPUT", _TYPES[slot_dtype(component.precision)]))
    differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if differing:
        name = differing[0]
        raise _mismatch(record, f"{name} is {_words(found.get(name))}, the graph has {_words(expected.get(name))}")
    if engine.num_optimization_profiles != len(record.key.profiles):
        raise _mismatch(record, f"it has {engine.num_optimization_profiles} profiles, not {len(record.key.profiles)}")
    for index, profile in enumerate(record.key.profiles):
        for name, shapes in (profile.shapes | ranked).items():
            built = tuple(tuple(int(n) for n in dims) for dims in engine.get_tensor_profile_shape(name, index))
            if built != shapes:
                raise _mismatch(record, f"profile {index} takes {name} as {built}, not {shapes}")


def _slot_shapes(slots: Iterable[Slot], record: PlanRecord) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Return the shapes of the inputs of slots, which are the same in every profile."""
    if not record.for_loras:
        return {}
    ranks = rank_range(record.key.lora_rank)
    low, usual, high = (
        {name: shape for slot in slots for name, shape in slot.sizes(rank).items()}
        for rank in (ranks.min, ranks.opt, ranks.max)
    )
    return {name: (low[name], usual[name], high[name]) for name in low}


def _tensors(engine: Any) -> dict[str, tuple[str, str]]:
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    return {name: (engine.get_tensor_mode(name).name, engine.get_tensor_dtype(name).name) for name in names}


def _expected(specs: Iterable[TensorSpec], mode: str) -> dict[str, tuple[str, str]]:
    return {spec.name: (mode, _TYPES[spec.dtype]) for spec in specs}


def _words(tensor: tuple[str, str] | None) -> str:
    return "absent" if tensor is None else " of type ".join(part.lower() for part in tensor)


def _mismatch(record: PlanRecord, reason: str) -> IncompatibleError:
    name = record.key.component
    return IncompatibleError(f"{record.file.file}: not the plan of {name} that the manifest records: {reason}; build it"
                             " again with export-engines")  # fmt: skip
