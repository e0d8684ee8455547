"""Judge the runs of a component: cases, warnings, failures and remedies."""

__all__ = ["NOT_RUN", "Outputs", "Results", "judge"]

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from sdxl_trt.engines import Array
from sdxl_trt.export.components import ComponentPlan
from sdxl_trt.export.verify.metrics import EXCESS, Figures, Pair, excess, limits_of, measure
from sdxl_trt.export.verify.overflow import FP16_MAX, NEAR_MISS, Peak, overflows
from sdxl_trt.export.verify.recording import Call
from sdxl_trt.export.verify.report import Comparison, ComponentReport, VerifyCase

Outputs = Mapping[str, Array]
NOT_RUN = {"bf16": "not run on ONNX Runtime, whose CPU provider has no bf16; compared in PyTorch"}
_SHOWN_PEAKS = 5
_BROKEN = "the graph does not match the model: export again, and report it if it fails again"
_REMEDIES = {
    "text_encoder": "export with --fp32 or --bf16",
    "unet": "export with --fp32 or --bf16",
    "controlnet": "export with --fp32 or --bf16",
    "vae_decoder": "export with --vae-precision fp32 or mixed, or with --vae sdxl-vae-fp16-fix",
    "vae_encoder": "export with --vae-precision fp32 or mixed, or with --vae sdxl-vae-fp16-fix",
}


_EIGHT_BIT_REMEDY = "see which layers with --quantize-report FILE, and keep them in floating point with --min-psnr"


@dataclass
class Results:
    """The runs of a component, call by call; a run that did not take place is empty.

    `calls` has PyTorch's fp32 outputs and `peaks` its largest activations; `rounded` and `dtypes` are PyTorch's at the
    export's precision, for an 8-bit component that of its other layers; `onnx` has ONNX Runtime's outputs.
    """

    calls: list[Call]
    peaks: Mapping[str, float]
    rounded: Sequence[Outputs] = field(default_factory=list)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    onnx: Sequence[Outputs] = field(default_factory=list)


@dataclass(frozen=True)
class _Pair:
    """Two runs to compare, which limits apply, and the remedy if they differ."""

    pair: Pair
    found: str
    reference: str
    remedy: str

    @property
    def title(self) -> str:
        return f"{self.found} against {self.reference}"


def judge(plan: ComponentPlan, results: Results) -> ComponentReport:
    """Return the report of one component."""
    pairs = _pairs(plan)
    compared = [[_compare(*_runs(pair, results, i)) for pair in pairs] for i in range(len(results.calls))]
    excesses = [_excess(results, i) for i in range(len(results.calls))]
    failures = [*_overflow_failures(plan, results)]
    for pair, column in zip(pairs, zip(*compared, strict=True), strict=True):
        failures += _failures(plan, pair, results, column)
    return ComponentReport(
        kind=plan.kind,
        precision=plan.precision,
        not_run=NOT_RUN.get(plan.precision, ""),
        cases=tuple(
            _case(call, pairs, row, more) for call, row, more in zip(results.calls, compared, excesses, strict=True)
        ),
        peaks=_largest(results.peaks),
        warnings=tuple(_warnings(results)),
        failures=(*failures, *_excess_failures(results, excesses)),
    )


def _pairs(plan: ComponentPlan) -> list[_Pair]:
    same = f"PyTorch {plan.precision}"
    cost = f"{plan.precision} costs too much: {_EIGHT_BIT_REMEDY if plan.eight_bit else _REMEDIES[plan.kind]}"
    if plan.precision in NOT_RUN:
        return [_Pair("precision", same, "PyTorch fp32", cost)]
    graph = _Pair("graph", "ONNX Runtime", same, _BROKEN)
    if plan.eight_bit:  # rounding differs from the first layer on, so only the size of the error can be compared
        return [_Pair("precision", "ONNX Runtime", "PyTorch fp32", cost)]
    return [graph] if plan.precision == "fp32" else [graph, _Pair("precision", "ONNX Runtime", "PyTorch fp32", cost)]


def _runs(pair: _Pair, results: Results, i: int) -> tuple[Outputs, Outputs]:
    """Return the outputs of call `i` and their reference."""
    exact = results.calls[i].outputs
    found = results.onnx[i] if results.onnx else results.rounded[i]
    return found, results.rounded[i] if pair.pair == "graph" and results.rounded else exact


def _compare(found: Outputs, reference: Outputs) -> list[Figures]:
    return [measure(name, found[name], reference[name]) for name in reference]


def _excess(results: Results, i: int) -> float | None:
    """Return ONNX Runtime's distance from fp32 over that of PyTorch at the same precision, for the worst output."""
    if not (results.onnx and results.rounded):
        return None
    exact, rounded, onnx = results.calls[i].outputs, results.rounded[i], results.onnx[i]
    found = [excess(onnx[name], rounded[name], exact[name]) for name in exact]
    return max(found)


def _case(call: Call, pairs: list[_Pair], compared: list[list[Figures]], more: float | None) -> VerifyCase:
    return VerifyCase(
        title=call.title,
        shapes=call.shapes,
        comparisons=tuple(
            Comparison(found=pair.found, reference=pair.reference, figures=min(figures, key=lambda each: each.rank))
            for pair, figures in zip(pairs, compared, strict=True)
        ),
        excess=more,
    )


def _largest(peaks: Mapping[str, float]) -> tuple[Peak, ...]:
    ranked = sorted(peaks.items(), key=lambda item: -item[1])
    return tuple(Peak(module, value) for module, value in ranked[:_SHOWN_PEAKS])


def _warnings(results: Results) -> Iterator[str]:
    near = [peak for peak in overflows(results.peaks, results.dtypes, NEAR_MISS) if peak.value <= FP16_MAX]
    if near and results.rounded:
        worst = max(near, key=lambda peak: peak.value)
        yield f"{worst.module} reaches {worst.value:.0f} of fp16's {FP16_MAX:.0f}; another prompt may overflow it"


def _overflow_failures(plan: ComponentPlan, results: Results) -> Iterator[str]:
    """Yield one failure that names the first overflowing module in the order of execution."""
    found = overflows(results.peaks, results.dtypes) if results.rounded else []
    if found:
        more = f" (and {len(found) - 1} more after it)" if len(found) > 1 else ""
        yield (
            f"{found[0].module} reaches {found[0].value:.3g}, beyond fp16's {FP16_MAX:.0f}{more};"
            f" {_REMEDIES[plan.kind]}"
        )


def _failures(plan: ComponentPlan, pair: _Pair, results: Results, column: tuple[list[Figures], ...]) -> Iterator[str]:
    """Yield one failure if a pair of runs differs: the first output beyond its limits, and the number of such calls."""
    limits = limits_of(plan.precision, pair.pair)
    problems = []
    for call, figures in zip(results.calls, column, strict=True):
        found = next(((each.output, text) for each in figures if (text := limits.problem(each))), None)
        problems += [f"{pair.title}: {found[0]} ({call.title}): {found[1]}"] if found else []
    if problems:
        yield f"{problems[0]}; {len(problems)} of {len(results.calls)} calls; {pair.remedy}"


def _excess_failures(results: Results, excesses: list[float | None]) -> Iterator[str]:
    beyond = [(more, call) for more, call in zip(excesses, results.calls, strict=True) if more and more > EXCESS]
    if beyond:
        worst, call = max(beyond, key=lambda each: each[0])
        yield (
            f"ONNX Runtime is {worst:.1f} times as far from PyTorch fp32 as PyTorch's own rounding ({call.title}),"
            f" {EXCESS:g} allowed; {_BROKEN}"
        )
