"""TensorRT and TensorRT for RTX: engines that run plans."""
