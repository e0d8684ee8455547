"""The PSNR against PyTorch fp32 that each stage must reach at each precision, and the component at fault below it."""

__all__ = ["STAGES", "TILED_LIMIT", "culprit", "limit_of"]

from sdxl_trt.engines.bundle import Precision

STAGES = ("embeddings", "handoff latents", "final latents", "pixels")
"""In the order of a run: an error in one stage shows in all later ones."""

# PSNR in dB. docs/quality.md lists the lowest values of the embedded pair (trained) and its cousin (50 million random
# parameters), and those with planted faults. Models of SDXL's depth round many times more often: hence the margin.
# Those of int8 and fp8 follow from 60 captions of the embedded pair at 30 steps, whose pixels had a median of 42.5 and
# 40.0 dB and 25.2 and 22.5 dB at worst: small differences choose another detail of a picture, and none is wrong.
_LIMITS: dict[str, tuple[float, float, float, float]] = {
    "fp32": (110.0, 100.0, 100.0, 60.0),
    "fp16": (60.0, 55.0, 55.0, 45.0),
    "bf16": (40.0, 35.0, 35.0, 25.0),
    "int8": (40.0, 25.0, 22.0, 22.0),
    "fp8": (40.0, 22.0, 19.0, 19.0),
}
_COARSEST = ("fp8", "int8", "bf16")
"""Coarser than fp16, the coarsest first."""
TILED_LIMIT = 30.0
"""For pixels decoded in tiles, unless the precision's own limit is lower: normalization differs from tile to tile."""


def limit_of(stage: str, precisions: set[Precision]) -> float:
    """Return the PSNR in dB that a stage must reach after components of these `precisions`."""
    finest = "fp32" if precisions <= {"fp32"} else "fp16"
    coarsest = next((each for each in _COARSEST if each in precisions), finest)
    return _LIMITS[coarsest][STAGES.index(stage)]


def culprit(stage: str, *, refined: bool) -> str:
    """Return the component at fault if `stage` is the first one below its limit."""
    last = "the refiner's UNet" if refined else "the base's UNet"
    named = ("the text encoders", "the base's UNet", last, "the VAE's decoder")
    return dict(zip(STAGES, named, strict=True))[stage]
