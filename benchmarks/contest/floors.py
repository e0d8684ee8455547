"""This CPU's GEMM rates, and the lower bound that they put on a task's time: its FLOPs at the peak rate."""

__all__ = ["Rates", "cpu_floors", "cpu_rates", "rate_facts"]

from sdxl_trt.benchmarks.contest.inputs import unet_rows
from sdxl_trt.benchmarks.contestants import Spec
from sdxl_trt.benchmarks.roofline import PRECISIONS, count_component, floor_seconds, measure_gemm
from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.engines.bundle import Bundle

Rates = dict[str, dict[int, float]]
"""Operations per second, a multiply-add being two, by precision and number of threads."""


def cpu_rates(threads: int) -> tuple[Rates, str]:
    """Return the highest GEMM rates on one thread and on `threads`, or none and a sentence that states why."""
    found: Rates = {}
    try:
        for count in sorted({1, threads}):
            for one in measure_gemm(count, precisions=PRECISIONS):
                by_threads = found.setdefault(one.precision, {})
                by_threads[count] = max(by_threads.get(count, 0.0), one.rate)
    except SdxlTrtError as exc:
        return {}, f"GEMM rates: {exc}"
    return found, ""


def rate_facts(rates: Rates) -> dict[str, str]:
    """Return `rates` as facts of the machine for a report."""
    facts = {}
    for precision, by_threads in rates.items():
        shown = " and ".join(f"{rate / 1e9:.0f}" for rate in by_threads.values())
        threads = " and ".join(f"{count}" for count in by_threads)
        unit = "GOP/s" if precision == "int8" else "GFLOP/s"
        facts[f"{precision}_GEMM"] = f"{shown} {unit} on {threads} thread{'' if threads == '1' else 's'}"
    return facts


def cpu_floors(bundle: Bundle, spec: Spec, rates: Rates) -> tuple[dict[str, float], str]:
    """Return the floor in seconds of every task that is a single graph, and a sentence on how it was computed.

    If FLOPs cannot be counted, or their fp32 rate is not known, there are no floors and the sentence states why.
    """
    manifest, rows = bundle.manifest, unet_rows(spec.batch, spec.guidance)
    rate = rates.get("fp32", {}).get(spec.threads)
    if rate is None:
        return {}, "floors: the rate of fp32 matrix products was not measured"
    graphs = {f"{name} UNet step": (stage.unet, rows) for name, stage in manifest.stages().items()}
    graphs["VAE decode"] = (list(manifest.stages().values())[-1].vae.decoder, 1)
    try:
        flops = {
            task: count_component(bundle, name, rows=count, height=spec.height, width=spec.width).flops
            for task, (name, count) in graphs.items()
        }
    except ImportError as exc:
        return {}, f"floors: the graphs' operations were not counted ({exc}); pip install 'sdxl-trt[export]'"
    except SdxlTrtError as exc:
        return {}, f"floors: {exc}"
    counted = ", ".join(f"{task} {each / 1e9:.1f} GFLOP" for task, each in flops.items())
    note = f"floors: {counted}, at {rate / 1e9:.0f} GFLOP/s, the highest rate of fp32 matrix products that was measured"
    return {task: floor_seconds(each, rate) for task, each in flops.items()}, f"{note} with {spec.threads} threads"
