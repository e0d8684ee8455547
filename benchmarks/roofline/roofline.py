"""A lower bound on SDXL's time on a GPU: an estimate from published peak rates, not a measurement.

The floor of a graph is the longer of two times: its FLOPs at the peak rate of its type, and its least bytes at the
peak memory bandwidth (`flops.Counts`). No program reaches peak rates. Published times are compared with the floor of
the same work.
"""

__all__ = ["estimate", "run_estimate"]

from collections.abc import Callable
from pathlib import Path

import msgspec

from sdxl_trt.benchmarks.roofline.estimates import Comparison, Estimate, HandoffEstimate, PartEstimate, Work
from sdxl_trt.benchmarks.roofline.flops import Counts, count_component
from sdxl_trt.benchmarks.roofline.gpus import Gpu, find_gpu
from sdxl_trt.benchmarks.roofline.published import PUBLISHED, Published, Rate
from sdxl_trt.benchmarks.roofline.sdxl_counts import read_counts
from sdxl_trt.engines import IncompatibleError, UsageError
from sdxl_trt.engines.bundle import (
    Bundle,
    Manifest,
    Precision,
    Scheduler,
    Stage,
    computes,
    needed_capability,
    read_bundle,
)
from sdxl_trt.runtime.diffusion.schedules import make_schedule
from sdxl_trt.runtime.request import step_at_fraction

# From SDXL's scheduler_config.json; it determines how many steps come before the handoff.
_SCHEDULER = Scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
                       steps_offset=1)  # fmt: skip
# The rate of each precision's products; "mixed" takes the faster of its two, since this is a floor. So do 8 bits: the
# few layers that stay in floats count as the others. `Attention` operators do not, which have no 8-bit kernels.
_RATES: dict[Precision, Rate] = {"fp16": "fp16", "mixed": "fp16", "bf16": "fp32_sums", "fp32": "tf32",
                                 "int8": "eight_bit", "fp8": "eight_bit"}  # fmt: skip


class _Graph(msgspec.Struct, frozen=True, kw_only=True):
    """A component used for a picture: its role and precisions, and the function that counts its cost.

    `floats` is the precision of what is not in 8 bits.
    """

    role: str
    precision: Precision
    floats: Precision
    count: Callable[[int, Work], Counts]


def run_estimate(
    gpu: str,
    *,
    engines: Path | None = None,
    steps: int = 30,
    handoff: float | None = 0.8,
    height: int = 1024,
    width: int = 1024,
    batch: int = 1,
) -> Estimate:
    """Return the floor for the GPU called `gpu` (see `gpus.GPUS`), counted from the bundle at `engines` if given.

    `handoff` is the fraction that the base denoises, or None for the base alone. Raises UsageError for an unknown GPU
    or an invalid handoff, steps or batch, and as `read_bundle` and `flops.count_component`.
    """
    bundle = None if engines is None else read_bundle(engines)
    scheduler = bundle.manifest.base.scheduler if bundle else _SCHEDULER
    if steps < 1 or batch < 1:
        raise UsageError(f"--steps {steps} --batch {batch}: give at least one of each")
    if bundle is not None and bundle.manifest.refiner is None:
        handoff = None
    base_steps = steps if handoff is None else _base_steps(scheduler, steps, handoff)
    work = Work(base_steps=base_steps, refiner_steps=steps - base_steps, height=height, width=width, batch=batch)
    return estimate(gpu, work, bundle)


def estimate(gpu: str, work: Work, bundle: Bundle | None = None) -> Estimate:
    """Return the floor of `work` on the GPU called `gpu`, for the graphs of `bundle` or SDXL's published ones.

    Published times are compared with the floor of the work they state; a `bundle` is not compared. Raises UsageError
    for an unknown GPU, IncompatibleError for one that cannot compute a graph's precision, SizeError for a size that the
    graphs do not take.
    """
    card = find_gpu(gpu)
    graphs = _published_graphs() if bundle is None else _bundle_graphs(bundle)
    _require_kernels(gpu, card, graphs)
    parts = _parts(card, work, graphs)
    own = [each for each in PUBLISHED if find_gpu(each.gpu) == card] if bundle is None else []
    return Estimate(
        gpu=card,
        work=work,
        counts_from="SDXL's configs (benchmarks/roofline/counts/sdxl.json)" if bundle is None else str(bundle.root),
        parts=tuple(parts),
        seconds=sum(part.calls * part.floor for part in parts),
        handoff=_handoff(card, work, graphs, parts),
        published=tuple(Comparison(published=each, floor=_published_floor(card, each, graphs)) for each in own),
    )


def _require_kernels(given: str, gpu: Gpu, graphs: dict[str, _Graph]) -> None:
    for graph in graphs.values():
        if not computes(graph.precision, gpu.capability):
            raise IncompatibleError(f"--estimate {given}: {graph.role} in {graph.precision} needs a compute capability"
                                    f" of {needed_capability(graph.precision)}, this GPU has {gpu.capability}; choose"
                                    " another GPU")  # fmt: skip


def _base_steps(scheduler: Scheduler, steps: int, handoff: float) -> int:
    if not 0.0 < handoff < 1.0:
        raise UsageError(f"--handoff {handoff}: choose a fraction between 0 and 1 (0.8 is usual), or none")
    return step_at_fraction(make_schedule(scheduler, steps), handoff)


def _published_graphs() -> dict[str, _Graph]:
    """Return SDXL's graphs by role, as export-engines makes them for TensorRT at fp16, with a bf16 decoder."""
    counted = read_counts().graphs

    def graph(role: str, name: str, precision: Precision) -> _Graph:
        of = counted[name]
        return _Graph(
            role=role,
            precision=precision,
            floats=precision,
            count=lambda rows, work: of.at(rows=rows, height=work.height, width=work.width, tokens=work.tokens),
        )

    return {
        "text_encoder": graph("text encoder 1", "text_encoder", "fp16"),
        "text_encoder_2": graph("text encoder 2", "text_encoder_2", "fp16"),
        "base": graph("base UNet step", "unet", "fp16"),
        "refiner": graph("refiner UNet step", "refiner_unet", "fp16"),
        "decoder": graph("VAE decoder", "vae_decoder_bf16", "bf16"),
    }


def _bundle_graphs(bundle: Bundle) -> dict[str, _Graph]:
    """Return a bundle's graphs by role; the decoder is the bf16 one for TensorRT if the bundle has it."""
    manifest, last = bundle.manifest, bundle.manifest.refiner or bundle.manifest.base

    def graph(role: str, name: str) -> _Graph:
        return _Graph(
            role=role,
            precision=manifest.components[name].precision,
            floats=manifest.components[name].float_precision,
            count=lambda rows, work: count_component(
                bundle, name, rows=rows, height=work.height, width=work.width, tokens=work.tokens
            ),
        )

    found = {name: graph(f"text encoder {i}", name) for i, name in enumerate(_encoders(manifest), 1)}
    found["base"] = graph("base UNet step", manifest.base.unet)
    if manifest.refiner is not None:
        found["refiner"] = graph("refiner UNet step", manifest.refiner.unet)
    found["decoder"] = graph("VAE decoder", last.vae.decoder_bf16 or last.vae.decoder)
    return found


def _encoders(manifest: Manifest) -> dict[str, None]:
    """Return the encoders of all stages, in order, without duplicates."""

    def names(stage: Stage) -> list[str]:
        return [encoder.component for encoder in stage.text_encoders]

    return dict.fromkeys(name for stage in manifest.stages().values() for name in names(stage))


def _parts(gpu: Gpu, work: Work, graphs: dict[str, _Graph]) -> list[PartEstimate]:
    """Return the parts of `work` in the order they run."""
    calls = {"base": work.base_steps, "refiner": work.refiner_steps}
    chunks = max(work.tokens // 77, 1)
    rows = dict.fromkeys(("base", "refiner"), work.rows * work.batch) | {"decoder": work.batch}
    parts = []
    for name, graph in graphs.items():
        times = calls.get(name, 1)
        if times:
            counts = graph.count(rows.get(name, work.rows * chunks), work)
            parts.append(_part(gpu, graph.role, times, counts, _RATES[graph.precision], _RATES[graph.floats]))
    return parts


def _part(
    gpu: Gpu, name: str, calls: int, counts: Counts, rate: Rate, attention_rate: Rate | None = None
) -> PartEstimate:
    """Return the floor of a graph; `attention_rate` is that of its `Attention` operators, by default `rate` too."""
    attention = counts.by_operator.get("Attention", 0)
    compute = (counts.flops - attention) / getattr(gpu, rate) + attention / getattr(gpu, attention_rate or rate)
    memory = counts.least_bytes / gpu.bandwidth
    traffic = (counts.weight_bytes + counts.activation_bytes) / gpu.bandwidth
    floor = max(compute, memory)
    return PartEstimate(name=name, calls=calls, counts=counts, rate=rate, compute=compute, memory=memory,
                        traffic=traffic, floor=floor)  # fmt: skip


def _handoff(gpu: Gpu, work: Work, graphs: dict[str, _Graph], parts: list[PartEstimate]) -> HandoffEstimate | None:
    """Return what the refiner saves and costs in `work`, or None without refiner steps."""
    if not work.refiner_steps:
        return None
    rows = work.rows * work.batch
    steps = {
        name: _part(gpu, name, 1, graph.count(rows, work), _RATES[graph.precision], _RATES[graph.floats])
        for name, graph in graphs.items()
        if name in ("base", "refiner")
    }
    saved = steps["base"].floor - steps["refiner"].floor
    base, refiner = (steps[name].counts.weight_bytes for name in ("base", "refiner"))
    resident = sum(part.counts.weight_bytes for part in parts)
    swap = (base + refiner) / gpu.link
    return HandoffEstimate(
        base_step=steps["base"].floor,
        refiner_step=steps["refiner"].floor,
        saved=saved * work.refiner_steps,
        load=refiner / gpu.link,
        swap=swap,
        steps_to_pay=swap / saved if saved > 0 else None,
        resident=resident,
        fits=resident < gpu.memory,
    )


def _published_floor(gpu: Gpu, published: Published, graphs: dict[str, _Graph]) -> float:
    """Return the floor of the published work, at the rates of its types."""
    work = Work(base_steps=published.base_steps, refiner_steps=published.refiner_steps, rows=published.rows)
    rates: dict[str, Rate] = {"base UNet step": published.unet, "refiner UNet step": published.unet}
    rates["VAE decoder"] = published.vae
    own = [_part(gpu, each.name, each.calls, each.counts, rates.get(each.name, "fp16"))
           for each in _parts(gpu, work, graphs)]  # fmt: skip
    wanted = {"picture": "", "unet": "UNet step", "vae": "VAE decoder"}[published.part]
    return sum(part.calls * part.floor for part in own if part.name.endswith(wanted))
