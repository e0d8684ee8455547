"""The estimate as Markdown; every part is labelled as an estimate."""

__all__ = ["estimate_table"]

from collections.abc import Iterable

from sdxl_trt.benchmarks.roofline.estimates import Estimate, HandoffEstimate
from sdxl_trt.benchmarks.roofline.published import Published, Rate

_TYPES = {"fp16": "fp16", "fp32_sums": "fp16 or bf16 summed in fp32", "tf32": "tf32", "eight_bit": "8 bits"}


def estimate_table(estimate: Estimate) -> str:
    """Return `estimate` as Markdown: the GPU and the work, the floor by graph, the handoff, published times."""
    blocks = [_head(estimate), _parts(estimate), _handoff(estimate), _published(estimate)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _head(estimate: Estimate) -> str:
    gpu, work = estimate.gpu, estimate.work
    steps = f"{work.base_steps + work.refiner_steps} steps"
    if work.refiner_steps:
        steps += f" ({work.base_steps} of the base, {work.refiner_steps} of the refiner)"
    guidance = "with guidance" if work.rows == 2 else "without guidance"
    sums = "" if gpu.fp32_sums == gpu.fp16 else f" ({gpu.fp32_sums / 1e12:.0f} summed in fp32)"
    rates = (
        f"dense fp16 {gpu.fp16 / 1e12:.0f} TFLOP/s{sums}, tf32 {gpu.tf32 / 1e12:.0f}, 8 bits {gpu.eight_bit / 1e12:.0f}"
    )
    memory = f"memory {gpu.memory / 1e9:.0f} GB at {gpu.bandwidth / 1e9:.0f} GB/s"
    link = f"PCI Express {gpu.pcie} x16, {gpu.link / 1e9:.1f} GB/s"
    made = f"{work.width}x{work.height}, {steps}, batch {work.batch}, {guidance}, {work.tokens} tokens"
    return (
        f"**Estimate, not a measurement**: the least time that an {gpu.name} can take at its published peak rates.\n"
        "No program reaches them; nothing was run.\n\n"
        f"- {rates}; {memory}; {link} ({gpu.source})\n"
        f"- {made}; counted from {estimate.counts_from}"
    )


def _parts(estimate: Estimate) -> str:
    rows = [
        [
            part.name,
            str(part.calls),
            f"{part.counts.flops / 1e12:.3f}",
            f"{part.counts.weight_bytes / 1e9:.2f} GB",
            _milliseconds(part.compute),
            _milliseconds(part.memory),
            f"**{_milliseconds(part.floor)}**",
            _milliseconds(part.traffic),
            _milliseconds(part.calls * part.floor),
        ]
        for part in estimate.parts
    ]
    head = ["graph", "calls", "TFLOP a call", "weights", "compute", "least bytes", "floor a call", "all operands moved",
            "floor in all"]  # fmt: skip
    batch = estimate.work.batch
    total = f"Floor (estimate): **{estimate.seconds:.3f} s**"
    each = f" for {batch} pictures, {estimate.seconds / batch:.3f} s each" if batch > 1 else " a picture"
    return "\n".join([*_table(head, rows), "", f"{total}{each}, at most {batch / estimate.seconds:.2f} pictures/s."])


def _handoff(estimate: Estimate) -> str:
    found = estimate.handoff
    if found is None:
        return ""
    saves = "save" if found.saved >= 0 else "cost"
    base, refiner = _milliseconds(found.base_step), _milliseconds(found.refiner_step)
    share, steps = found.refiner_step / found.base_step, estimate.work.refiner_steps
    fits = "fits" if found.fits else "does not fit"
    return (
        f"Handoff (estimate): a refiner step takes {share:.2f} of a base step ({refiner} of {base}), so {steps} of them"
        f" {saves} {_milliseconds(abs(found.saved))} compared with the base alone.\n"
        f"Loading the refiner's UNet from host memory takes at least {_milliseconds(found.load)}, a swap of both for"
        f" the next batch {_milliseconds(found.swap)}: {_pays(found)}\n"
        f"All weights resident are {found.resident / 1e9:.1f} GB, which {fits} in"
        f" {estimate.gpu.memory / 1e9:.0f} GB, not counting activations."
    )


def _pays(found: HandoffEstimate) -> str:
    if found.steps_to_pay is None:
        return "refiner steps are not cheaper, so a swap never saves time."
    return f"as much as {found.steps_to_pay:.0f} refiner steps save."


def _published(estimate: Estimate) -> str:
    if not estimate.published:
        return ""
    rows = [
        [
            each.published.what + (f" ({each.published.note})" if each.published.note else ""),
            _milliseconds(each.published.seconds),
            f"{_milliseconds(each.floor)} ({_TYPES[_judged(each.published)]})",
            f"{each.share:.0%}",
            each.published.source,
        ]
        for each in estimate.published
    ]
    head = ["published by others, 1024x1024", "their time", "floor of the same work", "floor / time", "source"]
    return "\n".join(_table(head, rows))


def _judged(published: Published) -> Rate:
    """Return the rate that determines the floor of the published work."""
    return published.vae if published.part == "vae" else published.unet


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _milliseconds(seconds: float) -> str:
    amount = seconds * 1e3
    return f"{amount:.0f} ms" if amount >= 100 else f"{amount:.2f} ms" if amount < 10 else f"{amount:.1f} ms"
