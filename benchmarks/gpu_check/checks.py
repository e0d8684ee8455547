"""The checks of ``make gpu-check``: functions that return their finding, raise, or are skipped."""

__all__ = ["Check", "all_checks"]

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from sdxl_trt.benchmarks.gpu_check.workplace import PICTURES, Skipped, Workplace, counted
from sdxl_trt.benchmarks.measure import FLAVOURS
from sdxl_trt.engines import IncompatibleError
from sdxl_trt.engines.backends.cuda import Cuda, Stream, cuda_runtime
from sdxl_trt.engines.backends.ort import ORT_PROVIDERS, OrtProvider, choose_provider
from sdxl_trt.engines.backends.trt import (
    current_environment,
    library_version,
    tensorrt_module,
)
from sdxl_trt.engines.build import build_plans
from sdxl_trt.engines.bundle import Flavour
from sdxl_trt.engines.host import format_bytes
from sdxl_trt.engines.inspection import compare_engines
from sdxl_trt.engines.residency import RESIDENCIES, estimate_memory, open_pool

# fp16 engines against ONNX Runtime, which computes fp16 graphs in fp32 on a CPU, over all steps of a picture.
LATENTS_TOLERANCE, LEAST_COSINE = 0.1, 0.999
# The same plans run the same kernels under any residency.
SAME_TOLERANCE = 1e-2
# CUDA's own memory on top of our allocations: kernel code, libraries' workspaces.
OVERHEAD, SLACK = 768 << 20, 1.1
LEFT_BEHIND = 64 << 20


@dataclass(frozen=True)
class Check:
    """A named check. `run` raises Skipped if the machine or the bundle lacks what it needs."""

    name: str
    run: Callable[[Workplace], str]


def all_checks() -> list[Check]:
    """Return the checks in order; later ones use what earlier ones built."""
    checks = [Check(f"{flavour}: {name}", partial(run, flavour)) for flavour in FLAVOURS for name, run in _EACH.items()]
    checks += [Check(f"tensorrt-rtx: {name}", run) for name, run in _RTX.items()]
    return checks + [
        Check(f"{provider}: a whole picture matches ort-cpu", partial(_onnxruntime, provider))
        for provider in ORT_PROVIDERS
        if provider != "ort-cpu"
    ]


def _bindings(flavour: Flavour, _: Workplace) -> str:
    try:
        trt = tensorrt_module(flavour)
    except IncompatibleError as exc:
        if flavour == "tensorrt-rtx":
            raise Skipped(str(exc)) from exc
        raise
    cuda_runtime()
    return f"TensorRT {library_version(trt)}, cuda-bindings"


def _environment(flavour: Flavour, workplace: Workplace) -> str:
    workplace.require_installed(flavour)
    key = current_environment(flavour)
    return f"{key.gpu}, compute capability {key.compute_capability}, driver {key.driver}, {key.platform}"


def _build(flavour: Flavour, workplace: Workplace) -> str:
    """Build plans if none fit; existing plans that fit are kept."""
    workplace.require_installed(flavour)
    try:
        records, how = workplace.records(flavour), "already built"
    except IncompatibleError:
        build_plans(workplace.root, flavour, flags=workplace.flags)
        records, how = workplace.records(flavour), "built"
    seconds = sum(record.seconds for record in records.values())
    size = sum(record.file.size for record in records.values())
    return f"{len(records)} plans {how}, {format_bytes(size)}, {seconds:.1f} s of building"


def _load(flavour: Flavour, workplace: Workplace) -> str:
    """Load and unload every plan twice; the second time must leave as much memory free as the first."""
    bundle, cuda = workplace.planned(flavour), Cuda()
    records, free = workplace.records(flavour), []
    with open_pool(bundle, flavour, "swap") as pool:
        for _ in range(2):
            for name in records:
                pool.phase(name)
            pool.free()
            free.append(cuda.memory()[0])
    left = max(free[0] - free[1], 0)
    if left > LEFT_BEHIND:
        raise AssertionError(f"{format_bytes(left)} were not freed by unloading")
    return f"{len(records)} plans; a second load and unload leaves {format_bytes(left)} allocated"


def _components(flavour: Flavour, workplace: Workplace) -> str:
    bundle = workplace.planned(flavour)
    found = compare_engines(bundle, workplace.records(flavour), flavour, "ort-cpu")
    wrong = [each for each in found if not each.passed]
    if wrong:
        raise AssertionError("; ".join(
            f"{each.component} {each.output} differs by {each.max_abs:.1e} ({each.allowed:.1e} allowed), cosine"
            f" {each.cosine:.6f} ({each.required} required)" for each in wrong
        ))  # fmt: skip
    worst = min(found, key=lambda each: each.cosine)
    return (
        f"{len(found)} outputs; worst {worst.component} {worst.output}: {worst.max_abs:.1e}, cosine {worst.cosine:.6f}"
    )


def _picture(flavour: Flavour, workplace: Workplace) -> str:
    workplace.planned(flavour)
    return _same_picture(workplace, flavour)


def _residencies(flavour: Flavour, workplace: Workplace) -> str:
    workplace.planned(flavour)
    reference, seen = workplace.run(flavour, RESIDENCIES[0]), []
    for residency in RESIDENCIES[1:]:
        if residency == "stream" and not workplace.streams(flavour):
            seen.append("stream not tried: the plans were not built with --weight-streaming")
            continue
        difference = float(np.abs(workplace.run(flavour, residency).latents - reference.latents).max())
        seen.append(f"{residency} differs from {RESIDENCIES[0]} by {difference:.1e}")
        if not difference <= SAME_TOLERANCE:
            raise AssertionError(f"{seen[-1]}, more than {SAME_TOLERANCE}")
    return "; ".join(seen)


def _one_swap(flavour: Flavour, workplace: Workplace) -> str:
    bundle = workplace.planned(flavour)
    if bundle.manifest.refiner is None:
        raise Skipped("the bundle has no refiner")
    run = workplace.run(flavour, "swap", pictures=PICTURES)
    if run.swaps != 1:
        raise AssertionError(f"{run.swaps} changes of UNets for {PICTURES} pictures, loads {', '.join(run.loads)}")
    return f"one change of UNets for {PICTURES} pictures"


def _memory(flavour: Flavour, workplace: Workplace) -> str:
    bundle = workplace.planned(flavour)
    total, seen = Cuda().memory()[1], []
    for residency in ("resident", "swap"):
        plan = estimate_memory(bundle, provider=flavour, capacity=total, residency=residency)
        peak = workplace.run(flavour, residency).peak
        seen.append(f"{residency}: {format_bytes(peak)} used, {format_bytes(plan.peak)} planned")
        if peak > plan.peak * SLACK + OVERHEAD:
            raise AssertionError(f"{seen[-1]}, which is too much")
    return "; ".join(seen)


def _graphs(flavour: Flavour, workplace: Workplace) -> str:
    """Count the launches of captured graphs; TensorRT for RTX captures internally and cannot be counted."""
    workplace.planned(flavour)
    with counted(Stream, "launch") as launches, _warnings() as warned:
        workplace.run(flavour, "resident", again=True)
    refused = [text for text in warned if "graph" in text]
    if refused:
        raise AssertionError(f"a CUDA graph could not be captured: {refused[0]}")
    if not launches and flavour == "tensorrt":
        raise AssertionError("no CUDA graph was launched during a whole picture")
    return f"{len(launches)} launches of CUDA graphs" if launches else "captured by TensorRT itself, if at all"


def _kernel_cache(workplace: Workplace) -> str:
    workplace.planned("tensorrt-rtx")
    workplace.run("tensorrt-rtx", "resident")
    digests = [record.file.sha256[:16] for record in workplace.records("tensorrt-rtx").values()]
    files = [file for file in workplace.cache.glob("rtx/*.kernels") if file.stem in digests]
    if not files:
        raise AssertionError("no compiled kernels were cached for the next process")
    return f"{len(files)} files of compiled kernels, {format_bytes(sum(file.stat().st_size for file in files))}"


def _onnxruntime(provider: OrtProvider, workplace: Workplace) -> str:
    import onnxruntime  # noqa: PLC0415 - only where it is used, like every engine's library

    try:
        served = choose_provider(onnxruntime, provider)
    except IncompatibleError as exc:
        raise Skipped(str(exc)) from exc
    return f"{served.name}: {_same_picture(workplace, provider)}"


def _same_picture(workplace: Workplace, provider: str) -> str:
    reference, run = workplace.run("ort-cpu").latents, workplace.run(provider).latents
    difference = float(np.abs(run - reference).max())
    cosine = float(np.vdot(run, reference) / (np.linalg.norm(run) * np.linalg.norm(reference)))
    seen = f"latents differ from ort-cpu's by at most {difference:.1e}, cosine {cosine:.6f}"
    if not (difference <= LATENTS_TOLERANCE and cosine >= LEAST_COSINE):
        raise AssertionError(f"{seen}; at most {LATENTS_TOLERANCE} and at least {LEAST_COSINE} are required")
    return seen


class _warnings(logging.Handler):  # noqa: N801 - a context manager, read as a function
    """Collects the engines' log warnings while the context is open."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Store the message."""
        self.messages.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("sdxl_trt.engines").addHandler(self)
        return self.messages

    def __exit__(self, *_: object) -> None:
        logging.getLogger("sdxl_trt.engines").removeHandler(self)


_EACH: dict[str, Callable[[Flavour, Workplace], str]] = {
    "the bindings import": _bindings,
    "the environment is known": _environment,
    "plans are built": _build,
    "plans load and unload": _load,
    "every component matches ONNX Runtime": _components,
    "a whole picture matches ort-cpu": _picture,
    "residencies give the same picture": _residencies,
    "one change of UNets": _one_swap,
    "memory is what was planned": _memory,
    "CUDA graphs are used": _graphs,
}
_RTX: dict[str, Callable[[Workplace], str]] = {
    "compiled kernels are kept": _kernel_cache,
}
