"""The figures of the embedded pair's model card."""

from sdxl_trt.benchmarks.model_card.cases import evaluation_cases

__all__ = ["evaluation_cases"]
