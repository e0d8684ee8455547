"""Single calls of one engine: inputs of any size, and ways to force a profile or to run without CUDA graphs."""

__all__ = ["Shape", "call", "forced_profile", "loaded", "reference_outputs", "stage_of", "unet_feed", "usual_shape",
           "without_graphs"]  # fmt: skip

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from unittest import mock

import numpy as np

from sdxl_trt.benchmarks.gpu_check.checks.findings import Skipped
from sdxl_trt.benchmarks.gpu_check.checks.likeness import Array
from sdxl_trt.benchmarks.gpu_check.checks.workplace import Workplace, sizes_of
from sdxl_trt.engines import Engine, EngineError, numpy_dtype
from sdxl_trt.engines.backends.cuda import Stream
from sdxl_trt.engines.backends.ort import OrtEngine, OrtProvider
from sdxl_trt.engines.backends.trt import TrtEngine, current_environment, open_device
from sdxl_trt.engines.bundle import Bundle, Component, Flavour, Stage, read_bundle
from sdxl_trt.engines.plans import TOKENS, find_plan

_CHOOSE = "sdxl_trt.engines.backends.trt.engine.choose_profile"
_TIMESTEP = 500.0
StageName = str


@dataclass(frozen=True)
class Shape:
    """The sizes of one call of a UNet: rows (two for a picture with guidance), pixels, tokens."""

    rows: int
    height: int
    width: int
    tokens: int = TOKENS

    def __str__(self) -> str:
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return f"{self.width}×{self.height}, {rows}, {self.tokens} tokens"


def stage_of(bundle: Bundle, name: str) -> Stage:
    """Return the stage called "base" or "refiner". Raises Skipped if the bundle has no refiner."""
    stage = bundle.manifest.stages().get("refiner") if name == "refiner" else bundle.manifest.base
    if stage is None:
        raise Skipped("the bundle has no refiner")
    return stage


def usual_shape(bundle: Bundle, rows: int = 2) -> Shape:
    """Return the shape that the plans of `bundle` are tuned for."""
    sizes = sizes_of(bundle)
    return Shape(rows, sizes.height.opt, sizes.width.opt, sizes.tokens.opt)


def unet_feed(component: Component, shape: Shape, factor: int, seed: int = 0) -> dict[str, Array]:
    """Return inputs of a UNet with the scales of a run, equal for equal arguments; `factor` is pixels per latent."""
    rng = np.random.default_rng(seed)
    axes = {"rows": shape.rows, "height": shape.height // factor, "width": shape.width // factor,
            "tokens": shape.tokens}  # fmt: skip
    feed: dict[str, Array] = {}
    for spec in component.inputs:
        sizes = [size if isinstance(size, int) else axes[size] for size in spec.shape]
        values = rng.standard_normal(sizes)
        if spec.name == "timestep":
            values[...] = _TIMESTEP
        elif spec.name == "time_ids":
            values[...] = np.resize([shape.height, shape.width, 0, 0], sizes)
        feed[spec.name] = values.astype(numpy_dtype(spec))
    return feed


@contextmanager
def loaded(
    workplace: Workplace, flavour: Flavour, name: str, *, weight_budget: int | None = None, root: Path | None = None
) -> Iterator[TrtEngine]:
    """Load component `name` on a device of its own; `root` is another bundle. Raises Skipped without its plan."""
    bundle = workplace.planned(flavour, name) if root is None else read_bundle(root, partial=True)
    record = find_plan(bundle, name, current_environment(flavour))
    with open_device(flavour) as device:
        engine = TrtEngine(bundle, record, device, weight_budget=weight_budget)
        try:
            engine.load()
            yield engine
        finally:
            engine.unload()


def call(engine: Engine, feed: Mapping[str, Array]) -> Array:
    """Return the first output of `engine`."""
    name = engine.component.outputs[0].name
    return engine.infer(feed, [name])[name]


def reference_outputs(workplace: Workplace, name: str, feeds: Sequence[Mapping[str, Array]]) -> list[Array]:
    """Return ONNX Runtime's first output of component `name` for each of `feeds`, each computed once for all checks."""
    bundle, provider = read_bundle(workplace.root), workplace.reference()
    engine = OrtEngine(bundle, name, cast(OrtProvider, provider))

    def compute(feed: Mapping[str, Array]) -> Array:
        engine.load()
        return call(engine, feed)

    try:
        return [workplace.stored(f"{name}-{provider}", feed, lambda feed=feed: compute(feed)) for feed in feeds]  # type: ignore[misc]
    finally:
        engine.unload()


@contextmanager
def forced_profile(index: int) -> Iterator[None]:
    """Let engines run new shapes with profile `index` of their plan instead of the nearest."""
    with mock.patch(_CHOOSE, return_value=index):
        yield


@contextmanager
def without_graphs() -> Iterator[None]:
    """Let every capture of a CUDA graph fail, so that engines run without graphs."""

    def refuse(*_: object) -> None:
        raise EngineError("captures are switched off for this check")

    with mock.patch.object(Stream, "capture", refuse):
        yield
