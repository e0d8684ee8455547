"""Checks of memory: what was planned against what is used, and streaming of half the weights."""

__all__ = ["planned_figures", "planned_memory", "streaming_half"]

from sdxl_trt.benchmarks.gpu_check.checks.calls import call, loaded, stage_of, unet_feed, usual_shape
from sdxl_trt.benchmarks.gpu_check.checks.findings import Finding, Skipped, finding, require
from sdxl_trt.benchmarks.gpu_check.checks.likeness import Array, same
from sdxl_trt.benchmarks.gpu_check.checks.sampler import MemorySampler
from sdxl_trt.benchmarks.gpu_check.checks.workplace import Workplace
from sdxl_trt.benchmarks.measure import Figure
from sdxl_trt.engines.backends.cuda import Cuda
from sdxl_trt.engines.bundle import Bundle, Flavour, read_bundle
from sdxl_trt.engines.host import format_bytes
from sdxl_trt.engines.residency import MemoryEstimate

# CUDA's own memory on top of our allocations: its context, kernel code, libraries' workspaces.
OVERHEAD, SLACK = 768 << 20, 1.1
_CALLS = 3
LEAST_STREAMABLE = 256 << 20
"""Below this, what is saved is lost among the allocations of the driver."""


def planned_memory(flavour: Flavour, workplace: Workplace) -> Finding:
    """The peak of a whole picture, sampled every few milliseconds, is what the memory plan says."""
    workplace.planned(flavour)
    seen, figures = [], []
    for residency in ("swap", "resident"):
        plan = planned_figures(flavour, workplace, residency)
        if plan.missing:
            seen.append(f"{residency} does not fit: {format_bytes(plan.peak)} planned")
            continue
        peak = workplace.run(flavour, residency).figures.peak
        seen.append(f"{residency}: {format_bytes(peak)} used, {format_bytes(plan.peak)} planned")
        figures += [Figure(f"peak, {residency}", float(peak), "B"), Figure(f"planned, {residency}", plan.peak, "B")]
        allowed = plan.peak * SLACK + OVERHEAD
        require(peak > 0, finding("no memory was seen in use", *figures), "the GPU's memory cannot be read")
        require(peak <= allowed, finding(seen[-1], *figures), f"at most {format_bytes(int(allowed))} is expected")
    return finding("; ".join(seen), *figures)


def planned_figures(flavour: Flavour, workplace: Workplace, residency: str) -> MemoryEstimate:
    """Return the memory plan of the whole picture that is drawn: its size chooses the profiles."""
    return workplace.estimate(flavour, residency, workplace.run_sizes(flavour))


def streaming_half(stage: str, flavour: Flavour, workplace: Workplace) -> Finding:
    """With half of its weights left in host memory, a UNet computes the same in less device memory."""
    name = stage_of(read_bundle(workplace.root), stage).unet
    bundle = workplace.planned(flavour, name)
    streamable = workplace.records(flavour, name)[name].memory.streamable
    if not streamable:
        raise Skipped("the plan was not built with --weight-streaming")
    Cuda().memory()  # now, so that the memory of CUDA's context counts in neither figure
    outputs, used = zip(
        *(_measured(workplace, flavour, bundle, name, budget) for budget in (streamable, streamable // 2)), strict=True
    )
    agree, difference = same(outputs[1], outputs[0])
    seen = f"{format_bytes(used[1])} with half of the weights, {format_bytes(used[0])} with all; {difference}"
    figures = Figure("all weights", float(used[0]), "B"), Figure("half of the weights", float(used[1]), "B")
    found = finding(seen, *figures)
    require(agree, found, "the same plan must compute the same")
    if streamable < LEAST_STREAMABLE:
        return finding(f"{seen}; {format_bytes(streamable)} to stream is too little to see the saving", *figures)
    least = streamable // 4
    return require(used[0] - used[1] >= least, found, f"at least {format_bytes(least)} less is expected")


def _measured(workplace: Workplace, flavour: Flavour, bundle: Bundle, name: str, budget: int) -> tuple[Array, int]:
    """Return the last output of some calls, and the memory that they took, in bytes."""
    feed = unet_feed(bundle.manifest.components[name], usual_shape(bundle), bundle.manifest.base.vae.factor)
    with MemorySampler() as memory, loaded(workplace, flavour, name, weight_budget=budget) as engine:
        for _ in range(_CALLS):
            output = call(engine, feed)
            memory.sample()
    return output, memory.grown
