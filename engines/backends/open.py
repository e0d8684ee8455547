"""Choose the provider that runs a bundle on this machine, and return a factory of its engines."""

__all__ = ["Backend", "check_compute_precision", "open_backend"]

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from sdxl_trt.engines.bundle import ANY, Bundle, Environment, Flavour, PlanRecord, Workload, run_components
from sdxl_trt.engines.engine import Engine
from sdxl_trt.engines.errors import IncompatibleError, SdxlTrtError, UsageError
from sdxl_trt.engines.host import available_host_memory
from sdxl_trt.engines.plans import SUGGESTED_RANK, PlanLimits, find_plan, has_plans, plan_limits, plan_notes

log = logging.getLogger(__name__)
PROVIDERS = ("ort-cpu", "ort-cuda", "ort-tensorrt", "tensorrt", "tensorrt-rtx", "openvino")
_FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class Backend:
    """An opened provider; nothing of the bundle is loaded yet.

    `make` returns an engine for a component; its second argument is the bytes of weights that may be on the device,
    None for all. `free` is the free memory for engines in bytes, None if unknown. `records` are the plans in use, and
    `slot_records` those that replace them in requests with LoRAs; `limits` are the sizes that the plans accept,
    `capability` the compute capability of TensorRT's GPU, None if plans are for any, and `close` frees the device.
    `memory` returns (free, total) bytes of the GPU as they are now, None if unknown or on a CPU. `computes` is the
    precision in which every graph is computed, None if each is computed in its own.
    """

    provider: str
    make: Callable[..., Engine]
    free: int | None
    records: Mapping[str, PlanRecord] = field(default_factory=dict)
    slot_records: Mapping[str, PlanRecord] = field(default_factory=dict)
    limits: PlanLimits | None = None
    capability: str | None = None
    close: Callable[[], None] = lambda: None
    memory: Callable[[], tuple[int, int] | None] = lambda: None
    computes: str | None = None


def open_backend(bundle: Bundle, provider: str, compute_precision: str = "auto") -> Backend:
    """Return the backend for `provider`; for "auto", the fastest that this machine and the bundle support.

    With "auto", a plan that does not fit this machine is still an error; a missing library or device is a warning.
    OpenVINO is never chosen by "auto"; `compute_precision` is "auto", or what it computes in: "fp32" or "bf16".
    Raises UsageError for an unknown provider or precision, IncompatibleError for one that is not available.
    """
    if provider not in ("auto", *PROVIDERS):
        raise UsageError(f"unknown provider {provider!r}; choose one of auto, {', '.join(PROVIDERS)}")
    if provider == "openvino":
        return _openvino(bundle, compute_precision)
    check_compute_precision(provider, compute_precision)
    if provider == "auto":
        return _fastest(bundle)
    for flavour in _FLAVOURS:
        if provider == flavour:
            return _tensorrt(bundle, flavour)
    return _onnxruntime(bundle, provider)


def _fastest(bundle: Bundle) -> Backend:
    for flavour in _FLAVOURS:
        if not has_plans(bundle, flavour):
            continue
        reason = _unavailable(flavour)
        if reason is None:
            return _tensorrt(bundle, flavour)
        if not bundle.manifest.onnx:
            raise reason
        log.warning("the bundle's %s plans are not used: %s", flavour, reason)
    return _onnxruntime(bundle, _fastest_onnxruntime())


def _unavailable(flavour: Flavour) -> IncompatibleError | None:
    """Return why TensorRT cannot run here (library, driver or GPU is missing), or None if it can."""
    from sdxl_trt.engines.backends.trt import open_device  # noqa: PLC0415 - one import a provider

    try:
        open_device(flavour).close()
    except IncompatibleError as exc:
        return exc
    return None


def _tensorrt(bundle: Bundle, flavour: Flavour) -> Backend:
    from sdxl_trt.engines.backends.trt import (  # noqa: PLC0415
        TrtEngine,
        current_environment,
        open_device,
    )

    environment = current_environment(flavour)
    capability = environment.compute_capability
    names = run_components(bundle.manifest, flavour, capability=capability)
    records = {name: find_plan(bundle, name, environment) for name in names}
    controls = tuple(each.component for each in bundle.manifest.controlnets)
    shallow = [stage.shallow for stage in bundle.manifest.stages().values() if stage.shallow is not None]
    others = run_components(
        bundle.manifest, flavour, Workload(from_image=True, controls=controls), capability=capability
    )
    for name in (*others, *shallow):
        # A component that only some runs need may lack a plan; `make` raises if it is used.
        if name not in records:
            with suppress(IncompatibleError):
                records[name] = find_plan(bundle, name, environment)
    slot_records = {}
    for name in records:
        # Only a request with LoRAs needs them: without one, `adapt` raises.
        with suppress(IncompatibleError):
            slot_records[name] = find_plan(bundle, name, environment, SUGGESTED_RANK)
    _tell_notes((*records.values(), *slot_records.values()), environment)
    device = open_device(flavour)
    try:
        device.require_kernels({name: bundle.manifest.components[name] for name in records})
        free, _ = device.cuda.memory()
    except BaseException:
        device.close()
        raise

    def make(name: str, weight_budget: int | None = None) -> Engine:
        record = records.get(name) or find_plan(bundle, name, environment)
        slot_plan = partial(find_plan, bundle, name, environment)
        return TrtEngine(bundle, record, device, weight_budget=weight_budget, slot_plan=slot_plan)

    return Backend(
        flavour,
        make,
        free,
        records,
        slot_records,
        plan_limits(bundle, records.values()),
        None if capability == ANY else capability,
        device.close,
        device.cuda.memory,
    )


def _tell_notes(records: Iterable[PlanRecord], environment: Environment) -> None:
    """Log each note about the plans once: most hold for all of them."""
    for note in dict.fromkeys(note for record in records for note in plan_notes(record, environment)):
        log.warning("plans are used that were %s; if they fail, build them again with export-engines --force", note)


def _onnxruntime(bundle: Bundle, provider: str) -> Backend:
    from sdxl_trt.engines.backends.ort import OrtEngine, OrtProvider  # noqa: PLC0415

    def make(name: str) -> Engine:
        return OrtEngine(bundle, name, cast(OrtProvider, provider))

    if provider == "ort-cpu":
        return Backend(provider, make, available_host_memory())
    _tell_floats(bundle, provider)
    memory = _device_memory()
    return Backend(provider, make, None if memory is None else memory[0], memory=_device_memory)


def check_compute_precision(provider: str, asked: str) -> None:
    """Raise UsageError for a compute precision of a provider that has no choice."""
    if asked != "auto" and provider != "openvino":
        raise UsageError(f"--compute-precision {asked} goes with --provider openvino: other providers compute as the"
                         " bundle was exported; leave it out, or export with --fp32, --fp16 or --bf16")  # fmt: skip


def _openvino(bundle: Bundle, asked: str) -> Backend:
    from sdxl_trt.engines.backends.ov import OvEngine, openvino_core, settled_precision  # noqa: PLC0415

    precision = settled_precision(asked)
    openvino_core()

    def make(name: str) -> Engine:
        return OvEngine(bundle, name, precision)

    return Backend("openvino", make, available_host_memory(), computes=precision)


def _tell_floats(bundle: Bundle, provider: str) -> None:
    """Warn of 8-bit components on ONNX Runtime's CUDA provider: it has no 8-bit products for graphs with Q/DQ nodes."""
    parts = bundle.manifest.components
    names = [name for name in run_components(bundle.manifest, provider) if parts[name].eight_bit]
    if provider == "ort-cuda" and names:
        log.warning("%s: ONNX Runtime's CUDA provider computes 8-bit layers in floating point, between conversions, so"
                    " that they save memory and no time; use --provider tensorrt, or a bundle exported with --fp16",
                    ", ".join(names))  # fmt: skip


def _device_memory() -> tuple[int, int] | None:
    """Return (free, total) bytes of the GPU, or None if unknown: ONNX Runtime runs without CUDA bindings."""
    from sdxl_trt.engines.backends.cuda import Cuda  # noqa: PLC0415 - one import a provider

    try:
        return Cuda().memory()
    except SdxlTrtError:
        return None


def _fastest_onnxruntime() -> str:
    """Return "ort-cuda" if it can start; an ONNX Runtime for GPUs on which it cannot is a warning."""
    from sdxl_trt.engines.backends.ort import CUDA, choose_provider  # noqa: PLC0415 - one import a provider

    try:
        import onnxruntime  # noqa: PLC0415 - 0.1 s; if it is missing, OrtEngine raises
    except ImportError:
        return "ort-cpu"
    if CUDA not in onnxruntime.get_available_providers():
        return "ort-cpu"
    try:
        choose_provider(onnxruntime, "ort-cuda")
    except IncompatibleError as exc:
        log.warning("continuing on the CPU: %s", exc)
        return "ort-cpu"
    return "ort-cuda"
