"""The reports of trt-inspect."""
