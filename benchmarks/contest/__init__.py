"""trt-bench: contestants take turns on the same inputs."""
