"""The shared state of the checks, on disk: the bundle, its plans, and what earlier checks' processes left."""

__all__ = ["STEPS", "USUAL", "Measured", "Pictures", "Workplace", "draw", "make_workplace", "require_disk",
           "sizes_of"]  # fmt: skip

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from sdxl_trt.benchmarks.gpu_check.checks.findings import Skipped
from sdxl_trt.benchmarks.gpu_check.checks.likeness import Array, Limits, limits_of
from sdxl_trt.benchmarks.gpu_check.checks.sampler import MemorySampler
from sdxl_trt.engines import IncompatibleError, SdxlTrtError
from sdxl_trt.engines.backends.cuda import Cuda
from sdxl_trt.engines.backends.trt import current_environment, tensorrt_module
from sdxl_trt.engines.bundle import BuildFlags, Bundle, Environment, Flavour, PlanRecord, read_bundle
from sdxl_trt.engines.host import atomic_write, available_host_memory, cache_folder, format_bytes
from sdxl_trt.engines.plans import (
    PlanLimits,
    RunSizes,
    Sizes,
    find_plan,
    plan_limits,
    planned_components,
    stage_sizes,
)
from sdxl_trt.engines.residency import EnginePool, MemoryEstimate, estimate_memory, open_pool
from sdxl_trt.mini import bundle_path
from sdxl_trt.runtime import Request
from sdxl_trt.runtime.pipeline import Pipeline
from sdxl_trt.runtime.request import resolve_request

PROMPT, SEED = "a large red star on a blue background", 7
STEPS = {False: 4, True: 10}
"""Steps of a picture, by whether the embedded pair is checked: at SDXL's size the CPU draws the reference, too."""
USUAL = "swap"
"""The residency of whole pictures: it fits where one UNet does."""
_HANDOFF = 0.5
_PLAN_SIZE = 1.1
"""The largest size of a plan in proportion to its component's weights."""
_PRIVATE = 0o700
_SETTINGS = "workplace.json"


class _Settings(msgspec.Struct, frozen=True):
    bundle: str
    quick: bool
    ours: bool
    other_opset: str = ""
    eight_bit: str = ""


class Measured(msgspec.Struct, frozen=True):
    """A run: engines loaded, changes of UNets, seconds of every unit of work by stage, and memory in bytes.

    `peak` is what the GPU's memory in use grew by, sampled by a thread; `total` is the seconds of the whole run, and
    `first_step` those until the first step of a UNet was done.
    """

    loads: tuple[str, ...]
    swaps: int
    peak: int
    seconds: dict[str, list[float]]
    total: float
    first_step: float


@dataclass(frozen=True)
class Pictures:
    """The final latents (n, c, h, w) and pixels (n, h, w, 3) of a run, with its figures."""

    latents: NDArray[np.float32]
    pixels: NDArray[np.uint8]
    figures: Measured


class Workplace:
    """The bundle that is checked, and a `folder` in which the checks' processes leave results for each other.

    Every method may be called from any of those processes; a result is made once, by the first that asks for it.
    """

    def __init__(self, folder: Path) -> None:
        settings = msgspec.json.decode((folder / _SETTINGS).read_bytes(), type=_Settings)
        self.folder = folder
        self.root = Path(settings.bundle)
        self.quick = settings.quick
        """Whether the bundle is a copy of the embedded pair, with models too small to show some faults."""
        self.other_opset = Path(settings.other_opset) if settings.other_opset else None
        """A bundle with some of the same graphs, exported for another operator set."""
        self.eight_bit = Path(settings.eight_bit) if settings.eight_bit else None
        """A bundle with the same UNets in 8 bits."""
        self.flags = BuildFlags(weight_streaming=settings.ours)
        """Flags for missing plans: a pair of our own is built with weight streaming, so that all residencies run."""
        self.cache = cache_folder()

    def require_installed(self, flavour: Flavour) -> None:
        """Raise Skipped if TensorRT of this flavour is not installed."""
        try:
            tensorrt_module(flavour)
        except IncompatibleError as exc:
            raise Skipped(f"{flavour} is not installed") from exc

    def planned(self, flavour: Flavour, *components: str) -> Bundle:
        """Return the bundle. Raises Skipped if it lacks plans of `components` (default: all) for this machine."""
        self.require_installed(flavour)
        try:
            self.records(flavour, *components)
        except IncompatibleError as exc:
            raise Skipped(str(exc)) from exc
        return read_bundle(self.root)

    def records(self, flavour: Flavour, *components: str) -> dict[str, PlanRecord]:
        """Return the plans of `components` (default: all) by component. Raises IncompatibleError if one is missing."""
        bundle, environment = read_bundle(self.root), current_environment(flavour)
        return {name: find_plan(bundle, name, environment) for name in components or self.components(flavour)}

    def missing(self, flavour: Flavour, *components: str) -> list[str]:
        """Return those of `components` without a plan for this machine."""
        bundle, environment = read_bundle(self.root), current_environment(flavour)
        return [name for name in components if not _has_plan(bundle, name, environment)]

    def components(self, flavour: Flavour) -> list[str]:
        """Return the components that TensorRT runs on this machine's GPU."""
        return planned_components(read_bundle(self.root).manifest, current_environment(flavour).compute_capability)

    def require_fit(self, flavour: Flavour, residency: str) -> None:
        """Raise Skipped if the device has not the memory for a whole picture under `residency`."""
        plan = self.estimate(flavour, residency)
        if plan.missing:
            raise Skipped(f"residency {residency} needs {format_bytes(plan.peak)} of GPU memory, of which"
                          f" {format_bytes(plan.usable or 0)} is usable")  # fmt: skip

    def estimate(self, flavour: Flavour, residency: str, run: RunSizes | None = None) -> MemoryEstimate:
        """Return the memory plan on this machine's GPU for a run of these sizes, by default the usual one.

        Raises IncompatibleError if a plan is missing.
        """
        return estimate_memory(
            read_bundle(self.root),
            provider=flavour,
            capacity=Cuda().memory()[1],
            residency=residency,
            records=self.records(flavour),
            capability=current_environment(flavour).compute_capability,
            run=run,
        )

    def run_sizes(self, flavour: Flavour) -> RunSizes:
        """Return the sizes of a whole picture (`request`) with this machine's plans: they choose its profiles.

        Raises IncompatibleError if a plan is missing, Skipped if those of the UNets state no sizes.
        """
        bundle = read_bundle(self.root)
        limits = plan_limits(bundle, self.records(flavour).values())
        if limits is None:
            raise Skipped("the plans of the UNets state no sizes")
        request = resolve_request(self.request(), bundle.manifest, limits)
        rows = 2 * max(len(request.seeds), limits.fewest)
        return RunSizes(height=request.height, width=request.width, rows=rows, tokens=limits.tokens.min)

    def limits(self, flavour: str) -> Limits:
        """Return the limits of whole pictures by this provider against ONNX Runtime on the CPU."""
        manifest = read_bundle(self.root).manifest
        planned = flavour.startswith("tensorrt")
        names = self.components(cast(Flavour, flavour)) if planned else list(manifest.components)
        return limits_of({manifest.components[name].precision for name in names}, deep=not self.quick)

    def request(self, pictures: int = 1) -> Request:
        """Return the request of every whole picture: the usual size, or the smallest one for a large model."""
        bundle = read_bundle(self.root)
        handoff = None if bundle.manifest.refiner is None else _HANDOFF
        sizes = sizes_of(bundle)
        height, width = (None, None) if self.quick else (sizes.height.min, sizes.width.min)
        return Request(PROMPT, seed=SEED, steps=STEPS[self.quick], handoff=handoff, count=pictures,
                       width=width, height=height)  # fmt: skip

    def run(self, provider: str, residency: str = USUAL, *, pictures: int = 1, again: bool = False) -> Pictures:
        """Return a whole run, made once; with `again` it is made in this process and not stored."""
        if again:
            return self._make(provider, residency, pictures)
        file = self.folder / f"run-{provider}-{residency}-{pictures}.npz"
        if not file.exists():
            if provider == "ort-cpu":
                self.require_host_memory()
            made = self._make(provider, residency, pictures)
            figures = np.frombuffer(msgspec.json.encode(made.figures), np.uint8)
            _save(file, {"latents": made.latents, "pixels": made.pixels, "figures": figures})
        stored = _load(file)
        figures_of = msgspec.json.decode(stored["figures"].tobytes(), type=Measured)
        return Pictures(stored["latents"], stored["pixels"], figures_of)

    def _make(self, provider: str, residency: str, pictures: int) -> Pictures:
        with self.opened(provider, residency) as pool:
            return draw(pool, self.request(pictures))

    @contextmanager
    def opened(self, provider: str, residency: str = USUAL) -> Iterator[EnginePool]:
        """Open the bundle on `provider`, and free it at the end."""
        with open_pool(read_bundle(self.root), provider, residency) as pool:
            yield pool

    def require_host_memory(self) -> None:
        """Raise Skipped if ONNX Runtime's CPU provider needs more host memory for this bundle than is free."""
        free, bundle = available_host_memory(), read_bundle(self.root)
        plan = estimate_memory(bundle, provider="ort-cpu", capacity=free, residency="swap")
        if not self.quick and plan.missing:
            raise Skipped(f"the reference on the CPU needs about {format_bytes(plan.peak)} of host memory,"
                          f" {format_bytes(free or 0)} is free")  # fmt: skip

    def reference(self) -> str:
        """Return the provider for references of single calls: "ort-cpu", or "ort-cuda" for a large model if it runs.

        Raises Skipped for "ort-cpu" with too little host memory.
        """
        if self.quick:
            return "ort-cpu"
        file = self.folder / "reference.txt"
        if not file.exists():
            _write(file, _large_reference(read_bundle(self.root)).encode())
        provider = file.read_text(encoding="utf-8")
        if provider == "ort-cpu":
            self.require_host_memory()
        return provider

    def stored(self, name: str, feed: Mapping[str, Array], make: Callable[[], Array]) -> Array:
        """Return the array `name` for the inputs `feed`: from an earlier process, or else what `make` returns."""
        digest = hashlib.sha256()
        for key, array in sorted(feed.items()):
            digest.update(f"{key} {array.dtype} {array.shape}".encode() + array.tobytes())
        file = self.folder / f"array-{name}-{digest.hexdigest()[:16]}.npz"
        if not file.exists():
            _save(file, {"array": make()})
        return _load(file)["array"]

    def without_paths(self, text: str) -> str:
        """Return `text` with this machine's folders replaced by placeholders."""
        for path, name in ((self.root, "BUNDLE"), (self.folder, "FOLDER"), (Path.home(), "~")):
            text = text.replace(str(path), name) if path.name else text  # a home may be the root
        return text


def make_workplace(
    folder: Path,
    bundle: Path | None = None,
    *,
    ours: bool,
    other_opset: Path | None = None,
    eight_bit: Path | None = None,
) -> None:
    """Write what `Workplace(folder)` reads: check `bundle`, or without one a copy of the embedded pair in `folder`.

    Plans that a pair of `ours` lacks are built with weight streaming.
    """
    root = bundle or _copy(bundle_path(), folder / "bundle")
    others = ("" if other is None else str(other.absolute()) for other in (other_opset, eight_bit))
    settings = _Settings(str(root.absolute()), bundle is None, ours, *others)
    _write(folder / _SETTINGS, msgspec.json.encode(settings))


def sizes_of(bundle: Bundle) -> Sizes | PlanLimits:
    """Return the sizes that the bundle's plans take or, without any, those that they would be built for."""
    return plan_limits(bundle, bundle.manifest.plans) or stage_sizes(bundle.manifest)


def require_disk(root: Path, components: Iterable[str]) -> None:
    """Raise Skipped if the disk of the bundle `root` has no room for plans of `components`."""
    names, records = list(components), read_bundle(root, partial=True).manifest.components
    needed = int(_PLAN_SIZE * sum(records[name].weights.size for name in names))
    free = shutil.disk_usage(root).free
    if free < needed:
        raise Skipped(f"plans of {', '.join(names)} need about {format_bytes(needed)} of disk, {format_bytes(free)} is"
                      " free")  # fmt: skip


def draw(pool: EnginePool, request: Request, since: float | None = None) -> Pictures:
    """Draw the pictures of `request` with the engines of `pool` and return them with their figures.

    The total and the time of the first step are counted from `since`, a time of perf_counter, by default from now.
    """
    latents, pixels = [], []
    seconds: dict[str, list[float]] = {}
    started, first_step = time.perf_counter() if since is None else since, 0.0
    pipeline = Pipeline(pool)  # the caller closes the pool
    with MemorySampler() as memory:
        for step in pipeline.steps(request):
            memory.sample()
            seconds.setdefault(step.stage, []).append(step.seconds)
            if step.latents is not None and not first_step:
                first_step = time.perf_counter() - started
            if step.picture is not None:
                latents.append(step.picture.latents)
                pixels.append(np.asarray(step.picture.image))
    total = time.perf_counter() - started
    figures = Measured(tuple(pool.loads), pool.swaps, memory.grown, seconds, total, first_step)
    return Pictures(np.stack(latents), np.stack(pixels), figures)


def _large_reference(bundle: Bundle) -> str:
    """Return "ort-cuda" if it loads a text encoder here, else "ort-cpu"."""
    from sdxl_trt.engines.backends.ort import OrtEngine  # noqa: PLC0415 - only for large models

    engine = OrtEngine(bundle, bundle.manifest.base.text_encoders[0].component, "ort-cuda")
    try:
        engine.load()
    except (SdxlTrtError, ImportError):
        return "ort-cpu"
    finally:
        engine.unload()
    return "ort-cuda"


def _has_plan(bundle: Bundle, name: str, environment: Environment) -> bool:
    try:
        find_plan(bundle, name, environment)
    except IncompatibleError:
        return False
    return True


def _save(file: Path, arrays: Mapping[str, Array]) -> None:
    with atomic_write(file) as out:
        np.savez(out, allow_pickle=False, **arrays)


def _load(file: Path) -> dict[str, Array]:
    with np.load(file, allow_pickle=False) as stored:
        return dict(stored)


def _write(file: Path, content: bytes) -> None:
    with atomic_write(file) as out:
        out.write(content)


def _copy(source: Path, target: Path) -> Path:
    """Copy a bundle readable and writable only by this user: plans are code."""
    shutil.copytree(source, target)
    for path in (target, *target.rglob("*")):
        path.chmod(_PRIVATE if path.is_dir() else _PRIVATE & 0o600)
    return target
