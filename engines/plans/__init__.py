"""TensorRT plans in a bundle: which one to use, for which sizes, and why one does not fit."""
