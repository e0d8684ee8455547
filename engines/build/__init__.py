"""ONNX graphs to TensorRT plans, one process per plan."""
