"""The command trt-generate."""
