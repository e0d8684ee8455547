"""A lower bound on this CPU's time for a task: its FLOPs at the measured peak GEMM rate."""

__all__ = ["cpu_floors"]

from sdxl_trt.benchmarks.contest.inputs import unet_rows
from sdxl_trt.benchmarks.contestants import Spec
from sdxl_trt.benchmarks.roofline import count_component, floor_seconds, peak_gemm_rate
from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.engines.bundle import Bundle


def cpu_floors(bundle: Bundle, spec: Spec) -> tuple[dict[str, float], str]:
    """Return the floor in seconds of every task that is a single graph, and a sentence on how it was computed.

    If FLOPs cannot be counted, there are no floors and the sentence states why.
    """
    manifest, rows = bundle.manifest, unet_rows(spec.batch, spec.guidance)
    graphs = {f"{name} UNet step": (stage.unet, rows) for name, stage in manifest.stages().items()}
    graphs["VAE decode"] = (list(manifest.stages().values())[-1].vae.decoder, 1)
    try:
        flops = {
            task: count_component(bundle, name, rows=count, height=spec.height, width=spec.width).flops
            for task, (name, count) in graphs.items()
        }
        rate = peak_gemm_rate(spec.threads)
    except ImportError as exc:
        return {}, f"floors: the graphs' operations were not counted ({exc}); pip install 'sdxl-trt[export]'"
    except SdxlTrtError as exc:
        return {}, f"floors: {exc}"
    counted = ", ".join(f"{task} {each / 1e9:.1f} GFLOP" for task, each in flops.items())
    note = f"floors: {counted}, at {rate / 1e9:.0f} GFLOP/s, the highest rate of fp32 matrix products that was measured"
    return {task: floor_seconds(each, rate) for task, each in flops.items()}, f"{note} with {spec.threads} threads"
