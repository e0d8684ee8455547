"""Checks of whole pictures: against ONNX Runtime on the CPU, under every residency, and twice the same."""

__all__ = ["determinism", "kernel_cache", "one_swap", "onnxruntime", "picture", "residencies"]

from sdxl_trt.benchmarks.gpu_check.checks.findings import Finding, Skipped, finding, require
from sdxl_trt.benchmarks.gpu_check.checks.likeness import EQUAL, cosine, decibels, same
from sdxl_trt.benchmarks.gpu_check.checks.workplace import USUAL, Workplace
from sdxl_trt.benchmarks.measure import Figure
from sdxl_trt.engines import IncompatibleError
from sdxl_trt.engines.backends.ort import OrtProvider, choose_provider
from sdxl_trt.engines.bundle import Flavour
from sdxl_trt.engines.host import format_bytes
from sdxl_trt.engines.residency import RESIDENCIES

PICTURES = 3


def picture(flavour: Flavour, workplace: Workplace) -> Finding:
    """A whole picture matches that of ONNX Runtime on the CPU: latents, and decoded pixels."""
    workplace.planned(flavour)
    return _same_picture(workplace, flavour)


def residencies(flavour: Flavour, workplace: Workplace) -> Finding:
    """All residencies draw the same picture: they load the same plans at other times."""
    workplace.planned(flavour)
    reference, seen = workplace.run(flavour), []
    for residency in RESIDENCIES:
        if residency == USUAL:
            continue
        try:
            _require(residency, workplace, flavour)
        except Skipped as exc:
            seen.append(f"{residency} not tried: {exc}")
            continue
        agree, difference = same(workplace.run(flavour, residency).latents, reference.latents)
        seen.append(f"{residency} against {USUAL}: {difference}")
        require(agree, finding(seen[-1]), "the same plans must compute the same")
    return finding("; ".join(seen))


def _require(residency: str, workplace: Workplace, flavour: Flavour) -> None:
    """Raise Skipped if the plans or the device's memory do not allow `residency`."""
    if residency == "resident":
        workplace.require_fit(flavour, residency)
    elif not all(record.key.flags.weight_streaming for record in workplace.records(flavour).values()):
        raise Skipped("the plans were not built with --weight-streaming")


def determinism(flavour: Flavour, workplace: Workplace) -> Finding:
    """The same plans draw the same latents again, in this process and in another, bit for bit."""
    workplace.planned(flavour)
    first = workplace.run(flavour).latents
    runs = [workplace.run(flavour, again=True).latents for _ in range(2)]
    for where, latents in zip(("another process", "the run before"), (first, runs[1]), strict=True):
        _, difference = same(runs[0], latents)
        require(difference.startswith("equal"), finding(f"against {where}: {difference}"), "equal bits are expected")
    return finding("3 runs, equal bit for bit")


def one_swap(flavour: Flavour, workplace: Workplace) -> Finding:
    """The UNets change once, however many pictures are drawn."""
    bundle = workplace.planned(flavour)
    if bundle.manifest.refiner is None:
        raise Skipped("the bundle has no refiner")
    run = workplace.run(flavour, pictures=PICTURES).figures
    seen = f"{run.swaps} change of UNets for {PICTURES} pictures"
    return require(run.swaps == 1, finding(seen), f"1 is expected; loads {', '.join(run.loads)}")


def kernel_cache(workplace: Workplace) -> Finding:
    """TensorRT for RTX leaves its compiled kernels in the cache for the next process."""
    workplace.planned("tensorrt-rtx")
    workplace.run("tensorrt-rtx")
    digests = [record.file.sha256[:16] for record in workplace.records("tensorrt-rtx").values()]
    files = [file for file in workplace.cache.glob("rtx/*.kernels") if file.stem in digests]
    size = sum(file.stat().st_size for file in files)
    found = finding(
        f"{len(files)} files of compiled kernels, {format_bytes(size)}", Figure("kernels", float(size), "B")
    )
    return require(files, found, "no compiled kernels were cached for the next process")


def onnxruntime(provider: OrtProvider, workplace: Workplace) -> Finding:
    """ONNX Runtime's provider starts in a fresh process and draws the picture of the CPU's."""
    import onnxruntime as ort  # noqa: PLC0415 - only where it is used, like every engine's library

    try:
        served = choose_provider(ort, provider)
    except IncompatibleError as exc:
        raise Skipped(str(exc)) from exc
    found = _same_picture(workplace, provider)
    return Finding(f"{served.name}: {found.seen}", found.figures)


def _same_picture(workplace: Workplace, provider: str) -> Finding:
    reference, run = workplace.run("ort-cpu"), workplace.run(provider)
    limits = workplace.limits(provider)
    near = cosine(run.latents, reference.latents)
    latents, pixels = decibels(run.latents, reference.latents), decibels(run.pixels, reference.pixels)
    seen = f"cosine of the latents {near:.6f}, PSNR {_words(latents)}, of the pixels {_words(pixels)}"
    psnrs = (Figure("PSNR of the latents", latents, "dB"), Figure("PSNR of the pixels", pixels, "dB"))
    found = finding(seen, Figure("cosine of the latents", near), *(each for each in psnrs if each.value != EQUAL))
    holds = near >= limits.cosine and latents >= limits.latents and pixels >= limits.pixels
    required = f"{limits.cosine:.4f}, {limits.latents:.0f} dB and {limits.pixels:.0f} dB are required"
    return require(holds, found, required)


def _words(value: float) -> str:
    return "equal" if value == EQUAL else f"{value:.1f} dB"
