"""What a stage must have in common with PyTorch fp32 at each precision, and what is off where it has not."""

__all__ = ["STAGES", "TILED_LIMIT", "culprit", "limit_of"]

from sdxl_trt.engines.bundle import Precision

STAGES = ("embeddings", "handoff latents", "final latents", "pixels")
"""In the order of a run: an error in one of them is seen in those that follow it."""

# PSNR in dB. The lowest measured, of the embedded pair (trained) and its cousin (50 million random parameters), is in
# docs/quality.md with what planted faults leave. Models of SDXL's depth round many times more often: hence the room.
_LIMITS: dict[str, tuple[float, float, float, float]] = {
    "fp32": (110.0, 100.0, 100.0, 60.0),
    "fp16": (60.0, 55.0, 55.0, 45.0),
    "bf16": (40.0, 35.0, 35.0, 25.0),
}
TILED_LIMIT = 30.0
"""Of pixels decoded in tiles, whatever the precision: each tile is normalized by what it sees."""


def limit_of(stage: str, precisions: set[Precision]) -> float:
    """Return the least PSNR in dB of a stage that components of these `precisions` have worked on."""
    widest = "bf16" if "bf16" in precisions else "fp32" if precisions <= {"fp32"} else "fp16"
    return _LIMITS[widest][STAGES.index(stage)]


def culprit(stage: str, *, refined: bool) -> str:
    """Return which part of the model is off where `stage` is the first that is."""
    last = "the refiner's UNet" if refined else "the base's UNet"
    named = ("the text encoders", "the base's UNet", last, "the VAE's decoder")
    return dict(zip(STAGES, named, strict=True))[stage]
