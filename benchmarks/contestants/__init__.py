"""The contestants of trt-bench, one process each."""

from sdxl_trt.benchmarks.contestants.protocol import TASKS, Answer, Ask, Bye, Failed, Memory, Ran, Ready, Spec

__all__ = ["TASKS", "Answer", "Ask", "Bye", "Failed", "Memory", "Ran", "Ready", "Spec"]
