"""The figures of the embedded pair's model card."""

from sdxl_trt.benchmarks.model_card.cases import CardCase, evaluation_cases
from sdxl_trt.benchmarks.model_card.effects import paired_effect, psnr

__all__ = ["CardCase", "evaluation_cases", "paired_effect", "psnr"]
