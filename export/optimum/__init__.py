"""The same models in optimum-onnx's layout."""
