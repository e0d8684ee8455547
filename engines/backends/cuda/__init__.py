"""CUDA: the runtime API, device memory and streams."""
