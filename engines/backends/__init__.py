"""The backends that run a graph: ONNX Runtime and TensorRT."""
