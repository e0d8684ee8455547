"""ONNX Runtime: engines, execution providers and the cache of compiled engines."""
