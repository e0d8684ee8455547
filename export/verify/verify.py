"""The exported graphs against PyTorch, component by component, on real activations.

Every component runs in PyTorch fp32 (which records the inputs of the next one, and its largest activations), in
PyTorch at the export's precision, and on ONNX Runtime's CPU provider, first the graph for all backends, then the one
for CPUs. One of them is in memory at a time.
"""

__all__ = ["verify_bundle"]

import gc
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

import msgspec

from sdxl_trt.engines import numpy_dtype
from sdxl_trt.engines.backends.ort import OrtEngine
from sdxl_trt.engines.bundle import Bundle, verify_file
from sdxl_trt.export.components import ComponentPlan, StagePlan
from sdxl_trt.export.eight_bit import Ranges, read_ranges
from sdxl_trt.export.graph import convert_module
from sdxl_trt.export.verify.layers import check_layers
from sdxl_trt.export.verify.overflow import watch_dtypes, watch_peaks
from sdxl_trt.export.verify.recording import Call, Recording, RecordingSettings
from sdxl_trt.export.verify.reference import load_reference, run_reference
from sdxl_trt.export.verify.report import ComponentReport, VerifyReport, write_report
from sdxl_trt.export.verify.shallow import check_shallow
from sdxl_trt.export.verify.simulation import simulated
from sdxl_trt.export.verify.verdict import NOT_RUN, Outputs, Results, judge

Progress = Callable[[str, str], None]
# In the order of a request: each component's inputs come from those before it.
_ORDER = ("text_encoder", "unet", "controlnet", "vae_decoder", "vae_encoder")
_LIBRARIES = ("torch", "onnxruntime", "diffusers", "transformers")


def verify_bundle(
    bundle: Bundle,
    components: Mapping[str, ComponentPlan],
    stages: Mapping[str, StagePlan],
    *,
    progress: Progress | None = None,
    settings: RecordingSettings | None = None,
) -> VerifyReport:
    """Compare every component of `bundle` with its PyTorch model; write ``verify.json`` and return the report.

    `progress` is called with each component and the run that begins. Failures are in the report; `VerifyReport.require`
    raises them. Raises CorruptError for files that do not match the manifest, ResourceError and EngineError if a
    backend cannot run.
    """
    settings, progress = settings or RecordingSettings(), progress or _silent
    recording = Recording(stages, settings)
    parts: dict[str, ComponentReport] = {}
    for name in sorted(components, key=lambda name: _ORDER.index(components[name].kind)):
        plan = components[name]
        record = bundle.manifest.components[name]
        results = _run_torch(name, plan, recording, progress)
        gc.collect()  # modules are reference cycles: free this one before the next is loaded
        if plan.precision not in NOT_RUN:
            results.rounded = _simulate(bundle, name, plan, results, progress, cpu=False)
            progress(name, "verifying: ONNX Runtime")
            results.onnx = _run_onnx(bundle, name, results.calls, standard=True)
        parts[name] = _with_layers(bundle, name, plan, judge(plan, results))
        if plan.precision not in NOT_RUN:
            parts[name] = _with_shallow(bundle, name, results.calls, parts[name], progress, standard=True)
        if cpu_graph := record.cpu_graph:
            results.rounded = _simulate(bundle, name, plan, results, progress, cpu=True)
            progress(name, "verifying: ONNX Runtime, the graph for a CPU")
            results.onnx = _run_onnx(bundle, name, results.calls, standard=False)
            parts[cpu_graph.file] = _with_shallow(
                bundle, name, results.calls, judge(plan, results), progress, standard=False
            )
    report = VerifyReport(
        generator=f"sdxl-trt {version('sdxl-trt')}",
        versions={library: version(library) for library in _LIBRARIES},
        seed=settings.seed,
        passed=all(part.passed for part in parts.values()),
        components=_ordered(parts, components),
    )
    write_report(bundle.root, report)
    return report


def _silent(component: str, stage: str) -> None:
    """Report nothing."""


def _run_torch(name: str, plan: ComponentPlan, recording: Recording, progress: Progress) -> Results:
    progress(name, "verifying: PyTorch fp32")
    graph = load_reference(plan)
    dtype = convert_module(graph, "fp32")
    with watch_peaks(graph.module.model) as peaks:
        calls = recording.calls(name, plan, lambda inputs: run_reference(graph, inputs, dtype))
    precision = plan.floats or plan.precision
    if precision == "fp32":
        return Results(calls, peaks)
    progress(name, f"verifying: PyTorch {precision}")
    dtype = convert_module(graph, precision)
    with watch_dtypes(graph.module.model) as dtypes:
        rounded = [run_reference(graph, call.inputs, dtype) for call in calls]
    return Results(calls, peaks, rounded, dtypes)


def _simulate(
    bundle: Bundle, name: str, plan: ComponentPlan, results: Results, progress: Progress, *, cpu: bool
) -> Sequence[Outputs]:
    """Return the outputs of an 8-bit component as PyTorch computes them; of any other those that are there."""
    quantization, ranges = bundle.manifest.components[name].quantization, _ranges(bundle, name)
    if quantization is None or ranges is None:
        return results.rounded
    progress(name, f"verifying: PyTorch {plan.precision}")
    graph = load_reference(plan)
    dtype = convert_module(graph, "fp32")
    with simulated(graph, plan, quantization, ranges, cpu=cpu):
        found = [run_reference(graph, call.inputs, dtype) for call in results.calls]
    del graph
    gc.collect()
    return found


def _with_layers(bundle: Bundle, name: str, plan: ComponentPlan, report: ComponentReport) -> ComponentReport:
    """Return a component's report with what is wrong with its 8-bit layers, one by one."""
    ranges = _ranges(bundle, name)
    if ranges is None:
        return report
    found = check_layers(bundle.root, bundle.manifest.components[name], plan, ranges)
    return msgspec.structs.replace(report, failures=(*report.failures, *found))


def _with_shallow(
    bundle: Bundle, name: str, calls: Sequence[Call], report: ComponentReport, progress: Progress, *, standard: bool
) -> ComponentReport:
    """Return a UNet's report with what is wrong with its shallow graph; that of another component is unchanged."""
    shallow = {stage.unet: stage.shallow for stage in bundle.manifest.stages().values()}.get(name)
    if shallow is None:
        return report
    progress(name, f"verifying: ONNX Runtime, {shallow}")
    found = check_shallow(bundle, name, shallow, calls, standard=standard)
    return msgspec.structs.replace(report, failures=(*report.failures, *found))


def _ranges(bundle: Bundle, name: str) -> Ranges | None:
    record = bundle.manifest.components[name].ranges
    if record is None:
        return None
    verify_file(bundle.path(record), record)
    return read_ranges(bundle.path(record), name)


def _ordered(
    parts: Mapping[str, ComponentReport], components: Mapping[str, ComponentPlan]
) -> dict[str, ComponentReport]:
    """Return the reports in the order of the components; the CPU graph's follows its component's."""
    places = list(components)
    return {part: parts[part] for part in sorted(parts, key=lambda part: (places.index(part.partition("/")[0]), part))}


def _run_onnx(bundle: Bundle, name: str, calls: Sequence[Call], *, standard: bool) -> list[Outputs]:
    engine = OrtEngine(bundle, name, standard=standard)
    dtypes = {spec.name: numpy_dtype(spec) for spec in engine.component.inputs}
    engine.load()
    try:
        return [engine.infer({key: value.astype(dtypes[key]) for key, value in call.inputs.items()}) for call in calls]
    finally:
        engine.unload()
