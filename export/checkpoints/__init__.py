"""Weight files: their tensors, names, dtypes and quantization scales."""
