"""Compare a variant's traces with PyTorch's; the results are rows of the report."""

__all__ = ["Scorer", "compare", "compare_tiled", "precisions_of"]

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.benchmarks.quality.likeness import PIXEL_RANGE, psnr, ssim
from sdxl_trt.benchmarks.quality.limits import STAGES, TILED_LIMIT, limit_of
from sdxl_trt.benchmarks.quality.traces import Pixels, Trace
from sdxl_trt.benchmarks.report import Quality
from sdxl_trt.engines.bundle import Precision
from sdxl_trt.runtime import Pipeline

Scorer = Callable[[Sequence[Pixels]], float | None]
"""Maps pictures, in the order of the cases, to the share that matches its prompt; None if that cannot be scored."""


def compare(
    variant: str,
    found: Sequence[Trace],
    reference: Sequence[Trace],
    precisions: Mapping[str, set[Precision]],
    score: Scorer,
) -> Iterator[Quality]:
    """Yield a row for every stage of the run; `precisions` maps a stage to those of all components up to it."""
    pictures = [trace.pixels for trace in found]
    for stage in STAGES:
        if stage == "handoff latents" and reference[0].handoff is None:
            continue
        values = [value for pair in zip(found, reference, strict=True) for value in _likeness(stage, *pair)]
        lowest = min((value for value in values if value is not None), default=None)
        limit, last = limit_of(stage, precisions[stage]), stage == "pixels"
        yield Quality(
            variant=variant,
            stage=stage,
            psnr=lowest,
            ssim=_lowest_ssim(pictures, reference) if last else None,
            score=score(pictures) if last else None,
            limit=limit,
            passed=lowest is None or lowest >= limit,
            pictures=len(found),
        )


def compare_tiled(
    variant: str,
    pictures: Sequence[Pixels],
    reference: Sequence[Trace],
    precisions: Mapping[str, set[Precision]],
    score: Scorer,
) -> Quality:
    """Return the row for pictures that were decoded in tiles; `precisions` are those of `compare`."""
    limit = min(TILED_LIMIT, limit_of(STAGES[-1], precisions[STAGES[-1]]))
    values = [psnr(one, other.pixels, PIXEL_RANGE) for one, other in zip(pictures, reference, strict=True)]
    lowest = min((value for value in values if value is not None), default=None)
    return Quality(
        variant=variant,
        stage="pixels",
        psnr=lowest,
        ssim=_lowest_ssim(pictures, reference),
        score=score(pictures),
        limit=limit,
        passed=lowest is None or lowest >= limit,
        pictures=len(pictures),
    )


def precisions_of(pipeline: Pipeline, *, refined: bool) -> dict[str, set[Precision]]:
    """Return, by stage, the precisions of all components that have run by its end; bf16 too if that computed them."""
    computed: set[Precision] = {"bf16"} if pipeline.pool.computes == "bf16" else set()
    manifest = pipeline.manifest
    stages = [manifest.base, *([manifest.refiner] if refined and manifest.refiner else [])]
    encoders = {encoder.component for stage in stages for encoder in stage.text_encoders}
    unets = [stage.unet for stage in stages]
    worked = [encoders, {unets[0]}, set(unets), {stages[-1].vae.decoder}]
    names = [set[str]().union(*worked[: place + 1]) for place in range(len(worked))]
    parts = manifest.components
    return {
        stage: computed | {parts[pipeline.pool.stand_in(name)].precision for name in each}
        for stage, each in zip(STAGES, names, strict=True)
    }


def _likeness(stage: str, found: Trace, reference: Trace) -> list[float | None]:
    """Return the PSNR of every array of a stage. Raises ValueError if the two traces hold different embeddings."""
    if stage == "embeddings":
        if found.embeddings.keys() != reference.embeddings.keys():
            raise ValueError(f"embeddings {sorted(found.embeddings)} against {sorted(reference.embeddings)}")
        return [psnr(array, reference.embeddings[name]) for name, array in found.embeddings.items()]
    if stage == "pixels":
        return [psnr(found.pixels, reference.pixels, PIXEL_RANGE)]
    if stage == "final latents":
        return [psnr(found.final, reference.final)]
    return [psnr(_present(found.handoff), _present(reference.handoff))]


def _present(latents: NDArray[Any] | None) -> NDArray[Any]:
    return np.zeros(0) if latents is None else latents


def _lowest_ssim(pictures: Sequence[Pixels], reference: Sequence[Trace]) -> float:
    return min(ssim(one, other.pixels) for one, other in zip(pictures, reference, strict=True))
