"""Results as tables, charts and pages."""

from sdxl_trt.benchmarks.report.figures import require_matplotlib
from sdxl_trt.benchmarks.report.markdown import markdown_report
from sdxl_trt.benchmarks.report.pages import write_pages
from sdxl_trt.benchmarks.report.records import (
    BenchReport, BenchSettings, ColdStart, Contestant, Measurement, Quality, Ratio, read_report,
)

__all__ = [
    "BenchReport", "BenchSettings", "ColdStart", "Contestant", "Measurement", "Quality", "Ratio", "markdown_report",
    "read_report", "require_matplotlib", "write_pages",
]
