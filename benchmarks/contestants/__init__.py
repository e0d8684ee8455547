"""The contestants of trt-bench, one process each."""
