"""Verify exported graphs against PyTorch."""

from sdxl_trt.export.verify.report import VERIFY_FILE, read_report
from sdxl_trt.export.verify.verify import verify_bundle

__all__ = ["VERIFY_FILE", "read_report", "verify_bundle"]
