"""LoRAs on the device: the inputs of a plan's slots, at addresses that stay the same as long as they can.

Only modules that a LoRA changes have buffers of their own; all others share one buffer of zeros. A change of LoRAs
uploads factors, a few hundred megabytes at most, and reloads nothing. LoRAs of the same rank for the same modules keep
every address, and so the CUDA graphs that were captured with them.
"""

__all__ = ["SlotInputs", "SlotPlan", "open_slots", "own_slots", "plan_slots"]

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sdxl_trt.engines.adapters import (
    FUSE_OR_FP16,
    WITHOUT_SLOTS,
    Factors,
    ScaledLora,
    SlotFactors,
    component_role,
    plan_factors,
)
from sdxl_trt.engines.backends.cuda import DeviceBuffer
from sdxl_trt.engines.backends.trt.device import TrtDevice, aligned
from sdxl_trt.engines.bundle import Bundle, PlanRecord, Slot, read_table, slot_dtype
from sdxl_trt.engines.engine import Array
from sdxl_trt.engines.errors import CorruptError, IncompatibleError
from sdxl_trt.engines.plans import MOST_RANK, SUGGESTED_RANK, Shapes, rebuild_command


def open_slots(bundle: Bundle, record: PlanRecord, device: TrtDevice) -> "SlotInputs | None":
    """Return the slots of a plan for LoRAs, with nothing on the device yet; None for another plan."""
    if not record.for_loras:
        return None
    name = record.key.component
    dtype = slot_dtype(bundle.manifest.components[name].precision)
    return SlotInputs(device, name, read_table(bundle, name).slots_by_module, np.dtype(dtype))


SlotPlan = Callable[[int], PlanRecord]
"""Returns the plan of a component for LoRAs of a rank; raises IncompatibleError, with what to type, without one."""


def own_slots(bundle: Bundle, record: PlanRecord) -> SlotPlan:
    """Return the SlotPlan of an engine that has only `record`."""

    def find(rank: int) -> PlanRecord:
        if record.for_loras:
            return record
        name, flavour = record.key.component, record.key.environment.flavour
        raise IncompatibleError(f"{bundle.root}: the {flavour} plan of {name} takes no LoRAs; build one that does with:"
                                f" {rebuild_command(bundle, flavour, max(rank, SUGGESTED_RANK))}")  # fmt: skip

    return find


class Planned(NamedTuple):
    """The plan that takes a request's LoRAs, and these as its inputs."""

    record: PlanRecord
    factors: SlotFactors


def plan_slots(bundle: Bundle, name: str, loras: Sequence[ScaledLora], find: SlotPlan) -> Planned:
    """Return how component `name` takes `loras`, at least one; their values are not read yet.

    Raises SourceError for a LoRA of another model, and IncompatibleError without a plan for LoRAs, for a change that no
    slot takes, and for ranks above the plan's, with the command that builds a plan for them.
    """
    component, role = bundle.manifest.components[name], component_role(name)
    table = read_table(bundle, name)
    otherwise = FUSE_OR_FP16 if component.eight_bit else WITHOUT_SLOTS
    if role is None or component.slot_graph is None:
        raise IncompatibleError(f"{bundle.root}: {name} has no graph that takes LoRAs, since an older version exported"
                                f" it; export the bundle again, or {otherwise}")  # fmt: skip
    # A shallow UNet leaves most of a LoRA to its UNet, which says what no slot takes.
    shallow = component.kind == "shallow_unet"
    unused = frozenset(each.name for each in table.tensors if shallow and each.offset is None)
    factors = plan_factors(loras, role, table.shapes, component.config, table.slots_by_module.keys(), otherwise, unused)
    record = find(max(factors.rank, 1))
    most, flavour = record.key.lora_rank, record.key.environment.flavour
    if factors.rank > most:
        command = rebuild_command(bundle, flavour, factors.rank)
        remedy = f"build plans for it with: {command}" if factors.rank <= MOST_RANK else otherwise
        raise IncompatibleError(f"{factors.told} need a rank of {factors.rank} in {name}, and its {flavour} plan was"
                                f" built for {most}; {remedy}")  # fmt: skip
    return Planned(record, factors)


class SlotInputs:
    """The inputs of all `slots` of one engine, in `dtype`; `name` is the component's, for messages.

    `rank` is that of the uploaded LoRAs, 0 before the first upload and after one that failed: the engine cannot run
    then. `uploaded` counts the bytes of factors that were copied to the device.
    """

    def __init__(self, device: TrtDevice, name: str, slots: Mapping[str, Slot], dtype: np.dtype[Any]) -> None:
        self.slots = slots
        self.rank = 0
        self.uploaded = 0
        self.addresses: Mapping[str, int] = {}
        """The address of every slot input, of those LoRAs that were uploaded last."""
        self._device = device
        self._name = name
        self._dtype = dtype
        self._buffers: dict[str, DeviceBuffer] = {}
        self._zeros: DeviceBuffer | None = None

    @property
    def shapes(self) -> Shapes:
        """The shapes of all slot inputs at the current rank."""
        return {name: shape for slot in self.slots.values() for name, shape in slot.sizes(self.rank).items()}

    def upload(self, factors: SlotFactors) -> None:
        """Replace the LoRAs on the device; the caller does not hold the device's lock.

        Files are read, and factors computed, without the lock, one slot at a time. Raises CorruptError for a LoRA that
        is damaged or beyond the range of the plan's dtype, ResourceError, EngineError.
        """
        doing = f"copying LoRAs for {self._name} to the GPU"
        self.rank = 0
        kept = {name for module in factors.modules for name in self.slots[module].sizes(factors.rank)}
        with self._device.lock:
            self._free(self._buffers.keys() - kept)
        for module, found in factors.each():
            self._send(self._arrays(self.slots[module], found.balanced(), factors), doing)
        self._grow_zeros(factors.rank, kept, doing)
        with self._device.lock:
            zeros = 0 if self._zeros is None else self._zeros.address
            names = (name for slot in self.slots.values() for name in slot.sizes(factors.rank))
            self.addresses = {name: self._buffers[name].address if name in kept else zeros for name in names}
        self.rank = factors.rank

    def free(self) -> None:
        """Free all buffers; the caller holds the device's lock."""
        self.rank, self.addresses = 0, {}
        self._free(set(self._buffers))
        if self._zeros is not None:
            self._zeros.free()
            self._zeros = None

    def _arrays(self, slot: Slot, found: Factors, factors: SlotFactors) -> dict[str, Array]:
        """Return the two inputs of a slot in the plan's dtype and axes."""
        given = (found.down, found.up) if slot.kernel else (found.down.T, found.up.T)
        with np.errstate(over="ignore"):
            cast = [np.ascontiguousarray(factor, self._dtype) for factor in given]
        if not all(np.isfinite(factor).all() for factor in cast):
            raise CorruptError(f"{factors.told}: factors for {slot.module} of {self._name} are beyond fp16's range;"
                               " lower the scale, or export the bundle with --fp32 or --bf16")  # fmt: skip
        sizes = slot.sizes(factors.rank)
        return {name: factor.reshape(sizes[name]) for name, factor in zip(sizes, cast, strict=True)}

    def _send(self, arrays: Mapping[str, Array], doing: str) -> None:
        """Copy arrays to their buffers, which only grow: at the same rank, addresses do not change."""
        stream = self._device.stream
        with self._device.computing(doing):
            staging = self._device.staging(sum(aligned(array.nbytes) for array in arrays.values()))
            offset = 0
            for name, array in arrays.items():
                view = staging.view(offset, array.shape, array.dtype)
                offset += aligned(array.nbytes)
                np.copyto(view, array)
                stream.upload(self._place(name, array.nbytes, doing), view, doing)
                self.uploaded += array.nbytes
            stream.synchronize(doing)

    def _place(self, name: str, nbytes: int, doing: str) -> int:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            self._free({name} & self._buffers.keys())
            buffer = self._buffers[name] = DeviceBuffer(self._device.cuda, aligned(nbytes), doing)
        return buffer.address

    def _grow_zeros(self, rank: int, changed: set[str], doing: str) -> None:
        """Have zeros for the largest input of a slot that no LoRA changes."""
        inputs = ((name, shape) for slot in self.slots.values() for name, shape in slot.sizes(rank).items())
        largest = max((math.prod(shape) for name, shape in inputs if name not in changed), default=0)
        nbytes = aligned(largest * self._dtype.itemsize)
        if nbytes <= (0 if self._zeros is None else self._zeros.nbytes):
            return
        with self._device.computing(doing):
            if self._zeros is not None:
                self._zeros.free()
                self._zeros = None
            view = self._device.staging(nbytes).view(0, (nbytes,), np.uint8)
            view[:] = 0
            self._zeros = DeviceBuffer(self._device.cuda, nbytes, doing)
            self._device.stream.upload(self._zeros.address, view, doing)
            self._device.stream.synchronize(doing)

    def _free(self, names: set[str]) -> None:
        for name in names:
            self._buffers.pop(name).free()
