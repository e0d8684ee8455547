"""A shallow UNet against its full one: fed what the full one has just computed, it must return the same."""

__all__ = ["check_shallow"]

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from sdxl_trt.engines import Array, numpy_dtype
from sdxl_trt.engines.backends.ort import OrtEngine
from sdxl_trt.engines.bundle import DEEP_FEATURE, Bundle, Precision
from sdxl_trt.export.verify.recording import Call

_MOST: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2}
"""The largest error as a share of the output's magnitude: what is kept is rounded to the graph's type."""
_MOST_OF_EIGHT_BIT = 5e-2
"""A rounded number may fall to the next of 256 steps."""
_REMEDY = "report this: the shallow graph is cut at the wrong place"


def check_shallow(bundle: Bundle, name: str, shallow: str, calls: Sequence[Call], *, standard: bool) -> list[str]:
    """Return what is wrong with the component `shallow` of the UNet `name`, in one line each, on recorded `calls`.

    With a factor of 0 it must continue from the newer of two hidden states, whatever the older is; with other factors,
    a factor a row, from their extrapolation. One engine is loaded at a time. `standard` is as for OrtEngine.
    """
    component = bundle.manifest.components[name]
    most = _MOST_OF_EIGHT_BIT if component.eight_bit else _MOST.get(component.precision, max(_MOST.values()))
    full, found = OrtEngine(bundle, name, standard=standard), []
    full.load()
    try:
        for call in calls:
            outputs = full.infer(_cast(full, call.inputs), ("out_sample", DEEP_FEATURE))
            found.append((outputs["out_sample"], outputs[DEEP_FEATURE]))
    finally:
        full.unload()
    short = OrtEngine(bundle, shallow, standard=standard)
    short.load()
    try:
        return [f"{shallow}: {call.title}: {what} differs from the full UNet's by {error:.2g} of its magnitude, more"
                f" than {most:g}; {_REMEDY}"
                for call, (exact, deep) in zip(calls, found, strict=True)
                for what, error in _errors(short, call, exact, deep) if not error <= most]  # fmt: skip
    finally:
        short.unload()


def _errors(engine: OrtEngine, call: Call, exact: Array, deep: Array) -> Iterator[tuple[str, float]]:
    """Yield what was compared, and the error, for a factor of 0 and for others."""
    known = {spec.name for spec in engine.component.inputs}
    inputs = {name: value for name, value in _cast(engine, call.inputs).items() if name in known}
    rows, other = len(deep), np.roll(deep, 1, axis=2)

    def run(new: Array, old: Array, factor: Array) -> Array:
        given = {**inputs, "deep_new": new, "deep_old": old, "deep_factor": factor}
        return engine.infer(given)["out_sample"]

    none, some = np.zeros(rows, np.float32), np.linspace(0.5, 1.5, rows, dtype=np.float32)
    yield "out_sample", _error(run(deep, other, none), exact)
    # The newer state is chosen so that the extrapolation is what the full UNet has computed.
    factor = some[:, None, None, None]
    newer = (deep.astype(np.float32) + other * factor) / (1 + factor)
    yield "out_sample of an extrapolation", _error(run(newer.astype(deep.dtype), other, some), exact)


def _error(found: Array, exact: Array) -> float:
    """Return the root mean square of the difference as a share of that of `exact`."""
    wide = exact.astype(np.float64)
    return float(np.sqrt(np.mean((found - wide) ** 2) / np.mean(wide**2)))


def _cast(engine: OrtEngine, inputs: Mapping[str, Array]) -> dict[str, Array]:
    dtypes = {spec.name: numpy_dtype(spec) for spec in engine.component.inputs}
    return {name: value.astype(dtypes.get(name, value.dtype)) for name, value in inputs.items()}
