"""Switching a LoRA on ONNX Runtime's CPU provider: seconds, memory, and what a step costs with it."""
