"""ONNX to something that infers: numpy in, numpy out. No torch."""
