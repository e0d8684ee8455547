"""Plans for the graphs of a bundle: which are to be built, and building them into the bundle, one by one."""

__all__ = [
    "PlanJob",
    "build_plans",
    "check_for",
    "drop_onnx",
    "plan_builds",
    "planned_components",
    "profiles_of",
    "size_multiple",
    "stage_sizes",
]

import math
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sdxl_trt.engines.build import build_plan
from sdxl_trt.engines.build_records import BuildEvent, BuildJob, BuiltPlan
from sdxl_trt.engines.bundle import MANIFEST, Bundle, read_bundle, write_manifest
from sdxl_trt.engines.digests import verify_file
from sdxl_trt.engines.environment import here
from sdxl_trt.engines.errors import (
    IncompatibleError,
    ResourceError,
    SdxlTrtError,
    UsageError,
    explain_os_error,
)
from sdxl_trt.engines.locking import exclusive
from sdxl_trt.engines.manifest import Component, Manifest
from sdxl_trt.engines.path_texts import require_utf8
from sdxl_trt.engines.plan_records import BuildFlags, Environment, Flavour, PlanKey, PlanMemory, PlanRecord
from sdxl_trt.engines.plans import PLANS, close_to_others, plan_path, why_rebuild
from sdxl_trt.engines.profiles import Profile, Sizes, axes_of, check_sizes, component_profiles, default_sizes
from sdxl_trt.engines.records import FileRecord

# A plan holds the weights and the kernels; measured by benchmarks/build.py.
_PLAN_BYTES, _PLAN_EXTRA = 1.05, 32 << 20


@dataclass(frozen=True)
class PlanJob:
    """The plan of one component: to be built under `key`, or kept where `record` is what the bundle has."""

    component: str
    key: PlanKey
    record: PlanRecord | None
    reasons: tuple[str, ...] = ()
    """Why a plan that is there is not kept."""


def stage_sizes(manifest: Manifest) -> Sizes:
    """Return the default sizes for a bundle: those that base and refiner both take."""
    base = manifest.base
    return default_sizes(base.sample_size, base.vae.factor, size_multiple(manifest), manifest.prompt_lengths())


def size_multiple(manifest: Manifest) -> int:
    """Return what the picture sides of a bundle must be multiples of, in pixels, with its deepest UNet in use."""
    return math.lcm(*(stage.size_multiple for stage in manifest.stages().values()))


def check_for(manifest: Manifest, sizes: Sizes) -> None:
    """Raise SizeError for sizes that the UNets of a bundle cannot take."""
    check_sizes(sizes, size_multiple(manifest), manifest.prompt_lengths())


def plan_builds(
    bundle: Bundle,
    environment: Environment,
    sizes: Sizes | None = None,
    flags: BuildFlags | None = None,
    *,
    components: Iterable[str] | None = None,
    force: bool = False,
) -> list[PlanJob]:
    """Return what building plans for `environment` comes to, component by component; nothing is built.

    `components` limits it. A plan that is there is kept where key and bytes are right. Raises UsageError for a
    component that the bundle has not, SizeError for sizes that its UNets cannot take.
    """
    sizes, flags = sizes or stage_sizes(bundle.manifest), flags or BuildFlags()
    check_for(bundle.manifest, sizes)
    names = planned_components(bundle.manifest)
    chosen = names if components is None else list(components)
    unknown = [name for name in chosen if name not in bundle.manifest.components]
    if unknown:
        raise UsageError(f"--components {','.join(unknown)}: the bundle has {', '.join(names)}")
    return [_job(bundle, name, environment, sizes, flags, force=force) for name in names if name in chosen]


def planned_components(manifest: Manifest) -> list[str]:
    """Return the components that TensorRT runs: all but those that a bf16 twin stands in for."""
    replaced: set[str] = set()
    for stage in manifest.stages().values():
        replaced |= {stage.vae.decoder} if stage.vae.decoder_bf16 else set()
        replaced |= {stage.vae.encoder} if stage.vae.encoder_bf16 and stage.vae.encoder else set()
    return [name for name in manifest.components if name not in replaced]


def _job(
    bundle: Bundle, name: str, environment: Environment, sizes: Sizes, flags: BuildFlags, *, force: bool
) -> PlanJob:
    component = bundle.manifest.components[name]
    profiles = profiles_of(component, sizes, bundle.manifest.base.vae.factor)
    key = PlanKey(
        component=name,
        graph=component.graph.sha256,
        weights=component.weights.sha256,
        environment=environment,
        profiles=profiles,
        flags=flags,
    )
    there = [record for record in bundle.manifest.plans if _place(record.key) == _place(key)]
    for record in there:
        if record.key == key and not force and _is_sound(bundle, record):
            return PlanJob(name, key, record)
    reasons = why_rebuild(there[0], component, environment, (profiles, flags)) if there else []
    return PlanJob(name, key, None, tuple(reasons))


def profiles_of(component: Component, sizes: Sizes, factor: int) -> tuple[Profile, ...]:
    """Return the profiles of a component's graph for `sizes`; `factor` is the pixels of a latent."""
    shapes = {spec.name: spec.shape for spec in component.inputs}
    return component_profiles(shapes, axes_of(component.kind, component.precision, sizes, factor))


def _place(key: PlanKey) -> tuple[str, str, str]:
    """Return what there is one plan of: a component, a flavour, a GPU."""
    return key.component, key.environment.flavour, key.environment.gpu


def _is_sound(bundle: Bundle, record: PlanRecord) -> bool:
    try:
        verify_file(bundle.path(record.file), record.file)
    except SdxlTrtError:
        return False
    return True


def build_plans(
    root: Path | str,
    flavour: Flavour = "tensorrt",
    sizes: Sizes | None = None,
    flags: BuildFlags | None = None,
    *,
    components: Iterable[str] | None = None,
    timing_cache: Path | None = None,
    force: bool = False,
    lock: bool = True,
    progress: Callable[[BuildEvent], None] | None = None,
) -> Bundle:
    """Build the plans of the bundle at `root` that it has not, for this machine, and return it opened.

    Each plan is in the manifest as soon as it is whole: an interrupted run goes on with the next one. `progress` is
    told every event of every build; without `lock` nothing keeps other writers away. Raises IncompatibleError without
    TensorRT or its GPU, SizeError, UsageError, ResourceError, and EngineError with the build log's last line.
    """
    environment = here(flavour)
    root = Path(root)
    for path in (root.absolute(), *(() if timing_cache is None else (timing_cache,))):
        require_utf8(path, "TensorRT")
    with exclusive(root.absolute(), lock=lock):
        bundle = read_bundle(root, partial=True)
        if not bundle.manifest.onnx:
            raise IncompatibleError(f"{root}: holds plans alone, and plans are built from graphs; export the bundle"
                                    " again without --plans-only")  # fmt: skip
        jobs = plan_builds(bundle, environment, sizes, flags, components=components, force=force)
        to_build = [job for job in jobs if job.record is None]
        _require_disk(bundle, to_build)
        for job in to_build:
            bundle = _build_one(bundle, job, timing_cache, progress)
        return bundle


def _build_one(
    bundle: Bundle, job: PlanJob, timing_cache: Path | None, progress: Callable[[BuildEvent], None] | None
) -> Bundle:
    component = bundle.manifest.components[job.component]
    for record in (component.graph, component.weights):
        verify_file(bundle.path(record), record)
    file = plan_path(job.key)
    target = bundle.root / file
    _make_folder(target.parent)
    built = build_plan(
        BuildJob(
            component=job.component,
            graph=bundle.path(component.graph),
            profiles=job.key.profiles,
            flavour=job.key.environment.flavour,
            flags=job.key.flags,
            timing_cache=timing_cache,
            plan=target,
            log=target.with_suffix(".log"),
        ),
        progress=progress,
    )
    return _enter(bundle, _record(job, file, built))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as exc:
        raise explain_os_error(exc, f"writing {folder}") from exc
    for place in (folder.parent, folder):
        close_to_others(place)


def _record(job: PlanJob, file: str, built: BuiltPlan) -> PlanRecord:
    return PlanRecord(
        key=job.key,
        file=FileRecord(file=file, size=built.size, sha256=built.sha256),
        memory=PlanMemory(weights=built.weights, activations=built.activations, streamable=built.streamable),
        seconds=built.seconds,
        log=str(Path(file).with_suffix(".log").as_posix()),
    )


def _enter(bundle: Bundle, record: PlanRecord) -> Bundle:
    """Enter `record` into the manifest in the place of an older one, whose file is then removed."""
    stale = [old for old in bundle.manifest.plans if _place(old.key) == _place(record.key)]
    kept = [old for old in bundle.manifest.plans if old not in stale]
    manifest = msgspec.structs.replace(bundle.manifest, plans=(*kept, record))
    write_manifest(bundle.root, manifest)
    for place in (bundle.root / MANIFEST, bundle.path(record.file)):
        close_to_others(place)
    for old in stale:
        if old.file.file != record.file.file:
            for path in (bundle.path(old.file), bundle.path(old.file).with_suffix(".log")):
                path.unlink(missing_ok=True)
    return Bundle(bundle.root, manifest)


def _require_disk(bundle: Bundle, jobs: Iterable[PlanJob]) -> None:
    need = sum(int(bundle.manifest.components[job.component].weights.size * _PLAN_BYTES) + _PLAN_EXTRA for job in jobs)
    free = shutil.disk_usage(bundle.root).free
    if need > free:
        raise ResourceError(f"{bundle.root}: plans need {need / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; free"
                            " some space, or write the bundle to another disk")  # fmt: skip


def drop_onnx(bundle: Bundle) -> Bundle:
    """Take graphs and weights out of a bundle that has a plan of every component, and return what is left.

    Raises UsageError where a component would be left without a plan.
    """
    planned = {record.key.component for record in bundle.manifest.plans}
    bare = [name for name in planned_components(bundle.manifest) if name not in planned]
    if bare:
        raise UsageError(f"--plans-only: {', '.join(bare)} would be left without a plan; build plans of all components")
    manifest = msgspec.structs.replace(bundle.manifest, onnx=False)
    write_manifest(bundle.root, manifest)
    # Out of sight in one step each, so that an interrupt leaves nothing that looks whole.
    with tempfile.TemporaryDirectory(prefix=f".{PLANS}-only.", dir=bundle.root) as away:
        for name, component in manifest.components.items():
            for record in component.files:
                path = bundle.path(record)
                path.replace(Path(away) / f"{name}-{path.name}")
            shutil.rmtree(bundle.path(component.graph).parent, ignore_errors=True)
    return Bundle(bundle.root, manifest)
