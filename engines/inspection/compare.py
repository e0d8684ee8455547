"""Compare two engines of one component on the same inputs, with Polygraphy's Comparator.

Polygraphy only compares here: it calls our own engines and never loads a graph or a plan, because its loaders let a
plan run code on the host.
"""

__all__ = ["Agreement", "Opened", "compare_engines", "compare_pair", "reference_of"]

import contextlib
import importlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from sdxl_trt.engines.backends.ort import OrtProvider, shape_limits
from sdxl_trt.engines.bundle import Bundle, Component, Flavour, Manifest, Profile, Record
from sdxl_trt.engines.engine import Array, Engine, numpy_dtype
from sdxl_trt.engines.errors import EngineError, IncompatibleError
from sdxl_trt.engines.inspection.example_inputs import example_inputs
from sdxl_trt.engines.plans import find_plan, reachable

Opened = Callable[[], AbstractContextManager[Engine]]
"""Returns a context manager in which an engine is loaded."""

_SILENT = 100  # above every level of Polygraphy's: it logs on stdout, and raises its errors too


@dataclass(frozen=True)
class _Limits:
    """Allowed differences of outputs: the largest error relative to the reference's range, and the lowest cosine."""

    relative: float
    cosine: float


# One graph on two backends differs only by rounding. If both round to fp16, each in its own way, they may differ as
# much as either does from fp32; export/verify has the same limits. A bf16 decoder is compared with an fp32 reference,
# so its limits are those of bf16. 8-bit graphs for ONNX Runtime's CPU provider and for plans round in other ways, and
# a step of each is some 42 dB (int8) or 40 dB (fp8) from fp32: errors of 0.8 and 1 % of the range, and many times that
# at worst.
_LIMITS = {
    "fp32": _Limits(relative=1e-3, cosine=1 - 1e-6),
    "fp16": _Limits(relative=3e-2, cosine=1 - 1e-4),
    "bf16": _Limits(relative=1e-1, cosine=1 - 2e-3),
    "mixed": _Limits(relative=3e-2, cosine=1 - 1e-4),
    "int8": _Limits(relative=0.15, cosine=1 - 4e-3),
    "fp8": _Limits(relative=0.2, cosine=1 - 6e-3),
}


class Agreement(Record, frozen=True, kw_only=True):
    """The difference between one output of `component` and that of `reference`, and whether it passes.

    It passes if `max_abs` is at most `allowed` and the cosine at least `required`; a NaN anywhere fails.
    """

    component: str
    reference: str
    precision: str
    output: str
    passed: bool
    max_abs: float
    mean_abs: float
    cosine: float
    allowed: float
    required: float


def compare_engines(
    bundle: Bundle,
    names: Iterable[str],
    left_provider: str,
    right_provider: str,
    *,
    progress: Callable[[str], None] | None = None,
) -> list[Agreement]:
    """Compare components `names` of `bundle` on two providers, once at sizes for which each profile is used.

    One engine is loaded at a time. `progress` is called with every component before it runs. Differences are returned,
    not raised. Raises IncompatibleError without Polygraphy or for a component that the right provider cannot run, and
    what engines raise.
    """
    found: list[Agreement] = []
    with ExitStack() as stack:
        left, right = (_side(bundle, provider, stack) for provider in (left_provider, right_provider))
        for name in names:
            reference = reference_of(bundle.manifest, name, right_provider)
            if reference is None:
                raise IncompatibleError(f"{name} is bf16, which {right_provider} cannot run, and the bundle has no fp32"
                                        " twin of it to compare with")  # fmt: skip
            if progress:
                progress(name)
            feeds = [example_inputs(bundle, name, each) for each in reachable(left.profiles(name))]
            sides = _opened(left.make, name), _opened(right.make, reference)
            found += compare_pair(bundle, name, *sides, feeds, reference)
    return found


@dataclass(frozen=True)
class _Side:
    """How a provider makes an engine, and the profiles that it is tuned for."""

    make: Callable[[str], Engine]
    profiles: Callable[[str], Sequence[Profile]]


def _side(bundle: Bundle, provider: str, stack: ExitStack) -> _Side:
    """Return a side whose device `stack` closes. It looks up plans one by one: other components may lack one."""
    if provider.startswith("ort-"):
        from sdxl_trt.engines.backends.ort import OrtEngine  # noqa: PLC0415 - one import a provider

        served = cast(OrtProvider, provider)
        return _Side(lambda name: OrtEngine(bundle, name, served), lambda name: [shape_limits(bundle, name)])
    from sdxl_trt.engines.backends.trt import (  # noqa: PLC0415
        TrtEngine,
        current_environment,
        open_device,
    )

    flavour = cast(Flavour, provider)
    environment, device = current_environment(flavour), open_device(flavour)
    stack.callback(device.close)
    return _Side(
        lambda name: TrtEngine(bundle, find_plan(bundle, name, environment), device),
        lambda name: find_plan(bundle, name, environment).key.profiles,
    )


def _opened(make: Callable[[str], Engine], name: str) -> Opened:
    @contextlib.contextmanager
    def opened() -> Iterator[Engine]:
        engine = make(name)
        try:
            engine.load()
            yield engine
        finally:
            engine.unload()

    return opened


def reference_of(manifest: Manifest, name: str, provider: str) -> str | None:
    """Return the component to compare `name` with on `provider`: itself, or the fp32 twin of a bf16 one.

    Returns None if the provider cannot run it and there is no twin.
    """
    if manifest.components[name].precision != "bf16" or not provider.startswith("ort-"):
        return name
    for stage in manifest.stages().values():
        twins = {stage.vae.decoder_bf16: stage.vae.decoder, stage.vae.encoder_bf16: stage.vae.encoder}
        if name in twins:
            return twins[name]
    return None


def compare_pair(
    bundle: Bundle, name: str, left: Opened, right: Opened, feeds: Sequence[Mapping[str, Array]], reference: str = ""
) -> list[Agreement]:
    """Compare two engines of component `name` on `feeds`; return the worst result of each output.

    Each engine is opened once, the left one first, and closed before the other is opened. Raises IncompatibleError
    without Polygraphy, EngineError if Polygraphy fails, and what engines raise.
    """
    polygraphy = _polygraphy()
    component = bundle.manifest.components[name]
    runners = [polygraphy.runner(side, opened) for side, opened in (("left", left), ("right", right))]
    try:
        with _quiet(polygraphy):
            runs = polygraphy.Comparator.run(runners, data_loader=[dict(feed) for feed in feeds])
            allowed = _allowed(component, runs["right"])
            limits = _LIMITS[component.precision]
            judges = [
                polygraphy.SimpleCompareFunc(atol=allowed, rtol=0.0, check_error_stat="max"),
                polygraphy.CosineSimilarityCompareFunc(limits.cosine),
            ]
            distances, cosines = polygraphy.Comparator.compare_accuracy(runs, compare_func=judges)
    except polygraphy.PolygraphyException as exc:
        reason = " ".join(str(exc).split())
        raise EngineError(f"comparing {name}: Polygraphy failed: {reason[:300]}") from exc
    ((_, distance),), ((_, cosine),) = distances.items(), cosines.items()
    return [
        _agreement(
            component, name, reference or name, output, allowed[output], list(zip(distance, cosine, strict=True))
        )
        for output in allowed
    ]


def _agreement(
    component: Component, name: str, reference: str, output: str, allowed: float, results: list[tuple[Any, Any]]
) -> Agreement:
    each = [(distance[output], cosine[output]) for distance, cosine in results]
    # A bare False instead of figures means that the shapes differ.
    measured = [pair for pair in each if not isinstance(pair[0], bool)]
    return Agreement(
        component=name,
        reference=reference,
        precision=component.precision,
        output=output,
        passed=all(bool(distance) and bool(cosine) for distance, cosine in each),
        max_abs=float(np.max([distance.max_absdiff for distance, _ in measured], initial=0.0)),
        mean_abs=float(np.max([distance.mean_absdiff for distance, _ in measured], initial=0.0)),
        cosine=float(np.min([cosine.cosine_similarity for _, cosine in measured], initial=1.0)),
        allowed=allowed,
        required=_LIMITS[component.precision].cosine,
    )


def _allowed(component: Component, references: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """Return the largest allowed error of each output, from its range in the reference runs."""
    share = _LIMITS[component.precision].relative
    ranges = {name: max(float(np.ptp(run[name]) or np.abs(run[name]).max()) for run in references)
              for name in references[0]}  # fmt: skip
    return {name: share * size for name, size in ranges.items()}


@contextlib.contextmanager
def _quiet(polygraphy: Any) -> Iterator[None]:
    """Silence Polygraphy's output, and numpy's warnings about NaN, which fails the comparison anyway."""
    with polygraphy.G_LOGGER.verbosity(_SILENT), np.errstate(all="ignore"):
        yield


class _Polygraphy:
    """The parts of Polygraphy in use, imported for the first comparison."""

    def __init__(self) -> None:
        comparator = importlib.import_module("polygraphy.comparator")
        self.Comparator: Any = comparator.Comparator
        self.SimpleCompareFunc: Any = comparator.SimpleCompareFunc
        self.CosineSimilarityCompareFunc: Any = comparator.CosineSimilarityCompareFunc
        self.TensorMetadata: Any = importlib.import_module("polygraphy.common").TensorMetadata
        self.G_LOGGER: Any = importlib.import_module("polygraphy.logger").G_LOGGER
        self.PolygraphyException: Any = importlib.import_module("polygraphy.exception").PolygraphyException
        self._base: Any = importlib.import_module("polygraphy.backend.base").BaseRunner

    def runner(self, side: str, opened: Opened) -> Any:
        """Return a BaseRunner that runs our engine while it is active."""
        metadata = self.TensorMetadata

        class EngineRunner(self._base):  # type: ignore[misc, name-defined]
            def activate_impl(self) -> None:
                with ExitStack() as stack:
                    self.engine = stack.enter_context(opened())
                    self.stack = stack.pop_all()

            def get_input_metadata_impl(self) -> Any:
                inputs = metadata()
                for spec in self.engine.component.inputs:
                    shape = [size if isinstance(size, int) else None for size in spec.shape]
                    inputs.add(spec.name, np.dtype(numpy_dtype(spec)), shape)
                return inputs

            def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
                started = time.perf_counter()
                outputs = self.engine.infer(feed_dict)
                self.inference_time = time.perf_counter() - started
                # In double precision: in single, the sums of a cosine lose the small differences.
                return {name: np.array(array, np.float64, order="C") for name, array in outputs.items()}

            def deactivate_impl(self) -> None:
                self.stack.close()
                del self.engine, self.stack

        return EngineRunner(name=side)


def _polygraphy() -> _Polygraphy:
    try:
        return _Polygraphy()
    except ImportError as exc:
        raise IncompatibleError(f"--verify needs Polygraphy ({exc}); pip install 'sdxl-trt[verify]'") from exc
