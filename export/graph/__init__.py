"""A PyTorch module to an ONNX graph with external weights."""
