"""Build the plans that a bundle lacks, one by one, and enter them into its manifest."""

__all__ = ["build_plans", "drop_onnx"]

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from sdxl_trt.engines.backends.trt import current_environment
from sdxl_trt.engines.build.jobs import PlanJob, _place, plan_builds
from sdxl_trt.engines.build.messages import BuildEvent, BuildJob, BuiltPlan
from sdxl_trt.engines.build.process import build_plan
from sdxl_trt.engines.build.timing import cache_file
from sdxl_trt.engines.bundle import (
    ANY,
    MANIFEST,
    BuildFlags,
    Bundle,
    FileRecord,
    Flavour,
    PlanMemory,
    PlanRecord,
    computes,
    read_bundle,
    verify_file,
    write_manifest,
)
from sdxl_trt.engines.errors import (
    IncompatibleError,
    ResourceError,
    UsageError,
    explain_os_error,
)
from sdxl_trt.engines.host import exclusive, require_utf8
from sdxl_trt.engines.plans import PLANS, Sizes, plan_path, planned_components, rank_range, remove_write_permission

log = logging.getLogger(__name__)
# A plan contains the weights once and the kernels of each profile; measured by benchmarks/full_size/build.py.
_PLAN_BYTES, _PLAN_EXTRA = 1.03, 96 << 20
# One for LoRAs also keeps kernels in the layout of the sum that a convolution takes.
_SLOT_PLAN_BYTES = 1.2


def build_plans(
    root: Path | str,
    flavour: Flavour = "tensorrt",
    sizes: Sizes | None = None,
    flags: BuildFlags | None = None,
    *,
    components: Iterable[str] | None = None,
    timing_cache: Path | bool = True,
    force: bool = False,
    lock: bool = True,
    lora_rank: int = 0,
    progress: Callable[[BuildEvent], None] | None = None,
) -> Bundle:
    """Build the plans that the bundle at `root` lacks for this machine, and return the opened bundle.

    Each plan enters the manifest as soon as it is complete, so a new run continues after an interrupted one. `progress`
    receives every event of every build; without `lock`, other writers are not kept out. With a `lora_rank`, UNets and
    text encoders get a second plan, for requests with LoRAs, whose ranks sum up to `lora_rank` at most. `timing_cache`
    is a file, read and updated, that makes later builds faster: True is that of this GPU and TensorRT in the cache
    folder, False none.
    Options that have no effect, or that NVIDIA's issues advise against, are told in a warning. Raises
    IncompatibleError without TensorRT or its GPU, or for bf16 graphs on a GPU without bf16, SizeError, UsageError,
    ResourceError, and EngineError with the build log's last line.
    """
    environment = current_environment(flavour)
    if flavour == "tensorrt-rtx" and isinstance(timing_cache, Path):
        log.warning("--timing-cache %s: ignored, since TensorRT for RTX times no kernels while it builds", timing_cache)
        timing_cache = False
    root = Path(root)
    named = timing_cache if isinstance(timing_cache, Path) else None
    for path in (root.absolute(), *(() if named is None else (named,))):
        require_utf8(path, "TensorRT")
    kept = cache_file(environment) if timing_cache is True else named
    with exclusive(root.absolute(), lock=lock):
        bundle = read_bundle(root, partial=True)
        if not bundle.manifest.onnx:
            raise IncompatibleError(f"{root}: contains only plans, and plans are built from graphs; export the bundle"
                                    " again without --plans-only")  # fmt: skip
        jobs = plan_builds(bundle, environment, sizes, flags, components=components, force=force,
                           lora_rank=lora_rank)  # fmt: skip
        to_build = [job for job in jobs if job.record is None]
        if to_build:
            _warn_of(flavour, flags or BuildFlags())
            _warn_of_older_gpus(bundle, to_build)
        _require_disk(bundle, to_build)
        for job in to_build:
            bundle = _build_one(bundle, job, environment.driver, kept, progress, shared_cache=named is None)
        return bundle


def _warn_of(flavour: Flavour, flags: BuildFlags) -> None:
    """Warn of options for hardware compatibility that have no effect, or that may fail on some GPUs."""
    if flavour == "tensorrt-rtx" and (flags.hardware_compatible or flags.same_compute_capability):
        log.warning("--hardware-compatible: no effect, since plans of TensorRT for RTX run on every RTX GPU since"
                    " Ampere")  # fmt: skip
    elif flags.hardware_compatible:
        log.warning("--hardware-compatible ampere: such plans are slower, and have failed on GPUs newer than Ampere;"
                    " if all GPUs have one compute capability, use --hardware-compatible same")  # fmt: skip


def _warn_of_older_gpus(bundle: Bundle, jobs: Iterable[PlanJob]) -> None:
    """Warn of plans for every RTX GPU in a precision that not all of them compute."""
    parts = bundle.manifest.components
    newer = [job.component for job in jobs if job.key.environment.compute_capability == ANY
             and not computes(parts[job.component].precision, "8.0")]  # fmt: skip
    if newer:
        log.warning("%s in fp8: plans of TensorRT for RTX that GPUs of compute capability 8.9 and later run",
                    ", ".join(dict.fromkeys(newer)))  # fmt: skip


def _build_one(
    bundle: Bundle,
    job: PlanJob,
    driver: str,
    timing_cache: Path | None,
    progress: Callable[[BuildEvent], None] | None,
    *,
    shared_cache: bool,
) -> Bundle:
    component = bundle.manifest.components[job.component]
    rank = job.key.lora_rank
    graph = component.planned_graph(rank) or component.graph
    for record in (graph, component.weights):
        verify_file(bundle.path(record), record)
    file = plan_path(job.key)
    target = bundle.root / file
    _make_folder(target.parent)
    built = build_plan(
        BuildJob(
            component=job.component,
            graph=bundle.path(graph),
            profiles=job.key.profiles,
            flavour=job.key.environment.flavour,
            flags=job.key.flags,
            lora_rank=rank_range(rank) if rank else None,
            timing_cache=timing_cache,
            shared_cache=shared_cache,
            plan=target,
            log=target.with_suffix(".log"),
        ),
        progress=progress,
    )
    return _enter(bundle, _record(job, file, built, driver))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as exc:
        raise explain_os_error(exc, f"writing {folder}") from exc
    for place in (folder.parent, folder):
        remove_write_permission(place)


def _record(job: PlanJob, file: str, built: BuiltPlan, driver: str) -> PlanRecord:
    return PlanRecord(
        key=job.key,
        file=FileRecord(file=file, size=built.size, sha256=built.sha256),
        memory=PlanMemory(
            weights=built.weights,
            activations=built.activations,
            streamable=built.streamable,
            profile_activations=built.profile_activations,
        ),
        seconds=built.seconds,
        log=str(Path(file).with_suffix(".log").as_posix()),
        chunks=built.chunks,
        driver="" if driver == ANY else driver,
    )


def _enter(bundle: Bundle, record: PlanRecord) -> Bundle:
    """Enter `record` into the manifest; an older one in its place (`_place`) is removed with its files."""
    stale = [old for old in bundle.manifest.plans if _place(old.key) == _place(record.key)]
    kept = [old for old in bundle.manifest.plans if old not in stale]
    manifest = msgspec.structs.replace(bundle.manifest, plans=(*kept, record))
    write_manifest(bundle.root, manifest)
    for place in (bundle.root / MANIFEST, bundle.path(record.file)):
        remove_write_permission(place)
    for old in stale:
        if old.file.file != record.file.file:
            for path in (bundle.path(old.file), bundle.path(old.file).with_suffix(".log")):
                path.unlink(missing_ok=True)
    return Bundle(bundle.root, manifest)


def _require_disk(bundle: Bundle, jobs: Iterable[PlanJob]) -> None:
    need = sum(_plan_bytes(bundle, job) for job in jobs)
    free = shutil.disk_usage(bundle.root).free
    if need > free:
        raise ResourceError(f"{bundle.root}: plans need {need / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB is free; free"
                            " some space, or write the bundle to another disk")  # fmt: skip


def _plan_bytes(bundle: Bundle, job: PlanJob) -> int:
    """Return the most that the plan of `job` may need on disk."""
    share = _SLOT_PLAN_BYTES if job.key.lora_rank else _PLAN_BYTES
    return int(bundle.manifest.components[job.component].used_bytes * share) + _PLAN_EXTRA


def drop_onnx(bundle: Bundle) -> Bundle:
    """Remove graphs and weights from a bundle that has a plan of every component; return the new bundle.

    The tables of tensors stay: a plan with adapter slots needs them.

    Raises UsageError if a component has no plan.
    """
    planned = {record.key.component for record in bundle.manifest.plans if not record.for_loras}
    # Which components run depends on the GPU: the plans of one of those that plans were built for must be complete.
    capabilities = {record.key.environment.compute_capability for record in bundle.manifest.plans} or {ANY}
    needs = [planned_components(bundle.manifest, capability) for capability in sorted(capabilities)]
    bare = min(([name for name in names if name not in planned] for names in needs), key=len)
    if bare:
        raise UsageError(f"--plans-only: {', '.join(bare)} would be left without a plan; build plans of all components")
    manifest = msgspec.structs.replace(bundle.manifest, onnx=False)
    write_manifest(bundle.root, manifest)
    # Each file is renamed away in one step, so that an interrupt leaves no half-deleted file.
    with tempfile.TemporaryDirectory(prefix=f".{PLANS}-only.", dir=bundle.root) as away:
        for name, component in manifest.components.items():
            for record in manifest.own_files(name):
                path = bundle.path(record)
                if record != component.adapters:
                    path.replace(Path(away) / f"{name}-{path.name}")
            if component.adapters is None:
                shutil.rmtree(bundle.path(component.graph).parent, ignore_errors=True)
    return Bundle(bundle.root, manifest)
