"""The Engine protocol on TensorRT and TensorRT for RTX: load plans, run them on a shared device, unload them.

`infer` copies only its inputs to the device and the requested outputs back. Constant inputs stay on the device from
`bind` on, at fixed addresses, so that the CUDA graph of a step stays valid for a run.
"""

__all__ = ["TrtDevice", "TrtEngine", "open_device"]

import logging
import threading
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sdxl_trt.engines.adapters import ScaledLora
from sdxl_trt.engines.backends.trt.check import check_engine
from sdxl_trt.engines.backends.trt.context import ShapedContext, ShapedContexts
from sdxl_trt.engines.backends.trt.device import TrtDevice, forget_frames, open_device
from sdxl_trt.engines.backends.trt.rtx import KernelCache
from sdxl_trt.engines.backends.trt.slots import SlotPlan, open_slots, own_slots, plan_slots
from sdxl_trt.engines.backends.trt.tensors import Layout, Tensors, nbytes_of
from sdxl_trt.engines.bundle import Bundle, Component, PlanRecord
from sdxl_trt.engines.engine import (
    Array,
    DeviceArray,
    Value,
    fill_optional,
    numpy_dtype,
    whole_feed,
)
from sdxl_trt.engines.errors import CorruptError, EngineError, IncompatibleError, SdxlTrtError, UsageError
from sdxl_trt.engines.plans import PlanReader, Shapes, choose_profile, outside_profiles, start_reading

log = logging.getLogger(__name__)


class TrtEngine:
    """One component's plan on `device`, which engines share.

    `weight_budget` is the bytes of streamable weights that may be on the device, for plans built with weight
    streaming; None for all. `slot_plan` returns the component's plan for LoRAs of a rank, or raises IncompatibleError;
    by default only a `record` for LoRAs takes any. Only one thread at a time may use an engine, except that `load` and
    `unload` may be called while another is in `prefetch`; several engines of a device may be loaded and run from
    several threads.
    """

    def __init__(
        self,
        bundle: Bundle,
        record: PlanRecord,
        device: TrtDevice,
        *,
        weight_budget: int | None = None,
        slot_plan: SlotPlan | None = None,
    ) -> None:
        self.name = record.key.component
        self.component: Component = bundle.manifest.components[self.name]
        self._weight_budget = weight_budget
        self._check_streaming(record)
        self._bundle = bundle
        self._plain = self._record = record
        self._slot_plan = slot_plan or own_slots(bundle, record)
        self._device = device
        self._plan: PlanReader | None = None
        self._reading = threading.Lock()
        self._engine: Any = None
        self._kernels: KernelCache | None = None
        self._contexts: ShapedContexts | None = None
        self._tensors = Tensors(device, self.name)
        self._slots = open_slots(bundle, record, device)
        self._loras: tuple[ScaledLora, ...] = ()
        self._constants: dict[str, Array] = {}
        self._activations: tuple[int, ...] = ()
        self._captures = True
        self._turn = 0

    def prefetch(self) -> None:
        """Read the plan and check its digests; see Engine.prefetch. Returns early after `unload` in another thread."""
        plan = self._started()
        if plan is None:
            return
        try:
            plan.wait()
        except BaseException:
            self._drop_plan()
            raise

    def load(self) -> None:
        """Put the weights on the device and reserve memory for the activations of the smallest profile.

        The reservation grows when `infer` first uses a larger profile; see Engine.load. Also raises IncompatibleError,
        for a plan that this TensorRT rejects or that is not the component's.
        """
        if self._engine is not None:
            return
        plan = self._started()
        doing = f"loading {self.name}"
        try:
            self._engine = self._device.deserialize(plan, doing)
            self._drop_plan()  # gigabytes, which the engine has copied
            check_engine(self._engine, self.component, self._record, self._slots.slots if self._slots else {})
            # Without the device's lock: the first context takes long enough to stall an engine that computes.
            with self._device.loading(doing):
                self._set_weight_budget(doing)
                self._open_kernels()
                self._contexts = ShapedContexts(self._device, self.name, self._new_context)
            self._activations = _activations(self._engine)
            with self._device.lock:
                self._device.activations.reserve(self, min(self._activations))
            self._upload()
        except BaseException as exc:
            # First the references in the traceback, so that the engine is freed under the device's lock by `unload`.
            forget_frames(exc)
            self.unload()
            lost = self._device.lost(doing) if isinstance(exc, EngineError) else None
            if lost is not None:
                raise lost from exc
            raise

    def reserve(self, nbytes: int) -> None:
        """Let the shared block of activations have `nbytes`, at most what the largest profile needs."""
        self._require_loaded("reserve")
        with self._device.lock:
            self._device.activations.reserve(self, min(nbytes, max(self._activations)))

    def adapt(self, loras: Sequence[ScaledLora]) -> None:
        """Use these LoRAs from the next call of `infer` on; see Engine.adapt.

        An engine with its plan for LoRAs loaded takes others at once: their factors are copied to the device, and
        nothing is loaded again. Between LoRAs and none it changes its plan, and is unloaded. Raises CorruptError for
        damaged LoRAs, which leave those before in place, and ResourceError or EngineError if the copy fails or those
        before cannot be put back; the engine must then be unloaded.
        """
        wanted = tuple(loras)
        if wanted == self._loras and (self._engine is None or not wanted or (self._slots and self._slots.rank)):
            return
        found = plan_slots(self._bundle, self.name, wanted, self._slot_plan) if wanted else None
        changed = found is not None and found.factors.modules  # of a shallow UNet a LoRA may change nothing
        self._change_plan(found.record if found is not None and changed else self._plain)
        before, self._loras = self._loras, wanted
        if self._slots is None:
            return
        self._slots.rank = 0
        try:
            self._upload()
        except CorruptError:
            self._loras = before
            self._put_back()
            raise

    def _put_back(self) -> None:
        """Copy the LoRAs before to the device again; an engine without them is not as before, and is unloaded."""
        try:
            self._upload()
        except CorruptError as exc:
            self.unload()
            raise EngineError(f"{self.name}: the LoRAs that it had cannot be put back: {exc}") from exc

    def bind(self, constants: Mapping[str, Array]) -> None:
        """Copy the inputs of a phase to the device; see Engine.bind. Raises UsageError, ResourceError, EngineError."""
        self._require_loaded("bind")
        self._check_constants(constants)
        constants = fill_optional(self.component, constants) | dict(constants)
        doing = f"binding the inputs of {self.name}"
        self._constants = {}
        with self._device.computing(doing):
            places = {name: self._tensors.place("bound", name, array.nbytes) for name, array in constants.items()}
            views = self._tensors.views([(array.shape, array.dtype) for array in constants.values()])
            self._tensors.send(places, constants, views, doing)
            self._device.stream.synchronize(doing)
        # `infer` needs the shapes and dtypes of the constants, not their values: one broadcast element is enough.
        self._constants = {
            name: np.broadcast_to(np.zeros((), array.dtype), array.shape) for name, array in constants.items()
        }

    def infer(self, inputs: Mapping[str, Value], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run the plan; see Engine.infer. Raises SizeError outside its profiles, ResourceError, EngineError.

        The first use of a profile that needs more activations may raise ResourceError; smaller sizes still run.
        """
        feed = self._feed(inputs)
        names = self._requested(outputs)
        with self._device.computing(f"running {self.name}"):
            return self._run(feed, self._bound(inputs), names)[0]

    def infer_on_device(self, inputs: Mapping[str, Value]) -> dict[str, DeviceArray]:
        """Run the plan and leave its outputs in their buffers; see Engine.infer_on_device."""
        feed = self._feed(inputs)
        with self._device.computing(f"running {self.name}"):
            found = self._run(feed, self._bound(inputs), [])[1]
            return {name: found[name] for name in self.component.results}

    def infer_keeping(
        self, inputs: Mapping[str, Value], kept: Collection[str], outputs: Sequence[str]
    ) -> tuple[dict[str, Array], dict[str, DeviceArray]]:
        """Run the plan, whose outputs in `kept` go to one of two buffers of theirs, in turn; see Engine.infer_keeping.

        The buffers are allocated when they are first used.
        """
        feed = self._feed(inputs)
        names, held = self._requested(outputs), self._requested(sorted(kept))
        with self._device.computing(f"running {self.name}"):
            self._turn = 1 - self._turn
            received, found = self._run(feed, self._bound(inputs), names, held)
            return received, {name: found[name] for name in held}

    def _bound(self, inputs: Mapping[str, Value]) -> frozenset[str]:
        """Return the names of the constants that `inputs` do not replace."""
        return frozenset(self._constants) - frozenset(inputs)

    def _feed(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        """Return every input of the graph: `inputs`, the constants with as many rows, zeros for what may be missing."""
        self._require_loaded("infer")
        if self._slots is not None and not self._slots.rank:
            raise EngineError(f"{self.name}: infer before adapt, on a plan for LoRAs; call adapt() first")
        # Slots are not among them: all rows share them, and they are not cut.
        feed = whole_feed(self.component, self._constants, inputs)
        for name, value in feed.items():
            if isinstance(value, DeviceArray) and value.home is not self._device:
                raise UsageError(f"{self.name}: input {name} is not on this engine's device; run both components with"
                                 " one pool")  # fmt: skip
        return feed

    def unload(self) -> None:
        """Free the plan, the engine, its memory and its share of the activations; see Engine.unload."""
        self._drop_plan()
        if self._kernels is not None:
            self._kernels.save()  # writes a file: without the device's lock
        with self._device.lock:
            self._constants = {}
            if self._contexts is not None:
                self._contexts.free()
            self._contexts = self._kernels = None
            self._engine = None  # after its contexts
            self._activations = ()
            self._captures = True
            self._tensors.free()
            if self._slots is not None:
                self._slots.free()
            self._device.activations.release(self)

    def _change_plan(self, record: PlanRecord) -> None:
        """Let the next `load` use another plan; raise IncompatibleError if it cannot stream weights as wanted."""
        if record is self._record:
            return
        self._check_streaming(record)
        self.unload()
        self._record, self._slots = record, open_slots(self._bundle, record, self._device)

    def _check_streaming(self, record: PlanRecord) -> None:
        if self._weight_budget is not None and not record.key.flags.weight_streaming:
            raise IncompatibleError(f"{self.name}: its plan cannot stream weights; build it again with"
                                    " --weight-streaming, or use --residency swap")  # fmt: skip

    def _upload(self) -> None:
        """Copy the LoRAs to a loaded engine."""
        if self._slots is not None and self._loras and self._engine is not None:
            self._slots.upload(plan_slots(self._bundle, self.name, self._loras, self._slot_plan).factors)

    def _started(self) -> PlanReader | None:
        """Return the reader of the plan, which reads from the first call on; None if the engine is loaded."""
        with self._reading:
            if self._plan is None and self._engine is None:
                self._plan = start_reading(self._bundle, self._record)
            return self._plan

    def _drop_plan(self) -> None:
        """Stop reading the plan, and give up its memory."""
        with self._reading:
            plan, self._plan = self._plan, None
        if plan is not None:
            plan.close()

    def _run(
        self, feed: Mapping[str, Value], bound: frozenset[str], names: list[str], kept: Sequence[str] = ()
    ) -> tuple[dict[str, Array], dict[str, DeviceArray]]:
        """Run on `feed`, of which `bound` is on the device; return the outputs `names`, and all of them there."""
        doing = f"running {self.name}"
        shapes = {name: value.shape for name, value in feed.items()}
        shaped = self._shaped(shapes, (self._turn if kept else None, *_handles(feed)))
        layouts: dict[str, Layout] = {
            spec.name: (shaped.output_shape(spec.name), numpy_dtype(spec)) for spec in self.component.outputs
        }
        given = {name: value for name, value in feed.items()
                 if name not in bound and not isinstance(value, DeviceArray)}  # fmt: skip
        places = self._places(feed, given, layouts, kept)
        views = self._tensors.views(
            [(array.shape, array.dtype) for array in given.values()] + [layouts[name] for name in names]
        )
        shaped.place(places, self._device.activations.block())
        self._tensors.send(places, given, views[: len(given)], doing)
        self._compute(shaped)
        received = self._tensors.receive(places, dict(zip(names, views[len(given) :], strict=True)), doing)
        stayed = {name: DeviceArray(shape, np.dtype(dtype), places[name], self._device)
                  for name, (shape, dtype) in layouts.items()}  # fmt: skip
        return received, stayed

    def _shaped(self, shapes: Shapes, places: Hashable) -> ShapedContext:
        """Return the context for inputs of `shapes`, and for what else changes from call to call at their `places`."""
        contexts, slots = self._require_loaded("infer"), self._slots
        if slots is None:
            return contexts.get(shapes, self._choose, places=places)
        return contexts.get(shapes, self._choose, slots.rank, lambda: slots.shapes, places)

    def _places(
        self,
        feed: Mapping[str, Value],
        given: Mapping[str, Array],
        layouts: Mapping[str, Layout],
        kept: Collection[str],
    ) -> dict[str, int]:
        """Return the address of every input and output of the graph."""
        place = self._tensors.place
        places = {name: value.handle if isinstance(value, DeviceArray) else place("bound", name, 0)
                  for name, value in feed.items() if name not in given}  # fmt: skip
        places |= {name: place("given", name, array.nbytes) for name, array in given.items()}
        uses = {name: f"kept.{self._turn}" if name in kept else "output" for name in layouts}
        places |= {name: place(uses[name], name, nbytes_of(layout)) for name, layout in layouts.items()}
        return places if self._slots is None else {**places, **self._slots.addresses}

    def _compute(self, shaped: ShapedContext) -> None:
        if self._captures and shaped.wants_graph:
            with self._device.capturing() as allowed:
                if allowed:  # else at the next step
                    self._capture(shaped)
        shaped.run()

    def _capture(self, shaped: ShapedContext) -> None:
        try:
            shaped.capture()
        except SdxlTrtError as exc:
            self._captures = False
            # As text: a kept log record would keep the traceback, and with it the context.
            log.warning("no CUDA graph: %s; continuing without, which may be slower", str(exc))

    def _choose(self, shapes: Shapes) -> int:
        """Return the profile for `shapes`, with memory reserved for its activations."""
        profiles = self._record.key.profiles
        profile = choose_profile(profiles, shapes)
        if profile is None:
            factor = self._bundle.manifest.base.vae.factor
            raise outside_profiles(self.name, self.component, profiles, shapes, factor)
        self._device.activations.reserve(self, self._activations[profile])
        return profile

    def _new_context(self) -> Any:
        """Return a new context of the engine that uses our memory."""
        doing = f"making a context of {self.name}"
        if self._kernels is not None:
            return self._device.ask(doing, self._kernels.create_context, self._engine)
        strategy = self._device.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return self._device.ask(doing, self._engine.create_execution_context, strategy)

    def _open_kernels(self) -> None:
        """Let TensorRT for RTX cache compiled kernels and capture graphs itself; decide whether we capture them."""
        if self._device.flavour == "tensorrt-rtx":
            kernels = KernelCache(self._device.trt, self._engine, self._record.file.sha256)
            self._kernels = kernels if kernels.usable else None
        # TensorRT documents that an engine which streams weights is synchronous and cannot be captured.
        self._captures = self._kernels is None and not _streams(self._engine)

    def _set_weight_budget(self, doing: str) -> None:
        """Set the bytes of streamable weights on the device; this must precede the first context."""
        if self._weight_budget is None:
            return
        budget = min(self._weight_budget, int(self._engine.streamable_weights_size))
        refused = f"it rejected a weight streaming budget of {budget} bytes"
        try:
            self._engine.weight_streaming_budget_v2 = budget
        except RuntimeError as exc:
            raise self._device.explain(doing, refused) from exc
        if int(self._engine.weight_streaming_budget_v2) != budget:
            raise self._device.explain(doing, refused)

    def _check_constants(self, constants: Mapping[str, Array]) -> None:
        """Raise UsageError unless the graph has these inputs; `infer` checks their sizes with those of the others."""
        specs = {spec.name: spec for spec in self.component.inputs}
        for name, array in constants.items():
            spec = specs.get(name)
            if spec is None:
                raise UsageError(f"{self.name}: input {name} bound, but the graph takes {sorted(specs)}")
            if array.dtype != numpy_dtype(spec) or array.ndim != len(spec.shape):
                raise UsageError(f"{self.name}: input {name}: {array.dtype} {list(array.shape)} bound, {spec.dtype}"
                                 f" {list(spec.shape)} expected")  # fmt: skip

    def _requested(self, outputs: Sequence[str] | None) -> list[str]:
        known = [spec.name for spec in self.component.outputs]
        unknown = sorted(set(outputs or ()) - set(known))
        if unknown:
            raise UsageError(f"{self.name}: output {unknown[0]} requested, but the graph has {known}")
        return list(self.component.results if outputs is None else outputs)

    def _require_loaded(self, call: str) -> ShapedContexts:
        if self._contexts is None:
            raise EngineError(f"{self.name}: {call} before load; call load() first")
        return self._contexts


def _handles(feed: Mapping[str, Value]) -> Iterator[int]:
    """Yield the addresses of the inputs that another engine left on the device."""
    return (value.handle for value in feed.values() if isinstance(value, DeviceArray))


def _activations(engine: Any) -> tuple[int, ...]:
    """Return the bytes that a context needs in each profile, including scratch memory for streamed weights.

    TensorRT documents the V2 figures as depending on the budget for weights, which must be set before.
    """
    size = engine.get_device_memory_size_for_profile_v2
    return tuple(int(size(profile)) for profile in range(engine.num_optimization_profiles))


def _streams(engine: Any) -> bool:
    """Return whether some weights of the engine stay in host memory."""
    streamable = int(engine.streamable_weights_size)
    return streamable > 0 and int(engine.weight_streaming_budget_v2) < streamable
