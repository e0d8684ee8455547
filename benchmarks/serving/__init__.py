"""trt-serve under load, and beside a server of diffusers."""
