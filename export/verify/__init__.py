"""Verify exported graphs against PyTorch, on inputs that are recorded while the model draws."""

from sdxl_trt.export.verify.metrics import measure
from sdxl_trt.export.verify.recording import Call, RecordedPicture, Recording, RecordingSettings
from sdxl_trt.export.verify.report import VERIFY_FILE, read_report
from sdxl_trt.export.verify.verify import verify_bundle

__all__ = [
    "VERIFY_FILE", "Call", "RecordedPicture", "Recording", "RecordingSettings", "measure", "read_report",
    "verify_bundle",
]
