"""Results as tables, charts and pages."""

from sdxl_trt.benchmarks.report.document import Section, Table
from sdxl_trt.benchmarks.report.figures import SAID, axes_of, coloured, drawn, require_matplotlib, styled
from sdxl_trt.benchmarks.report.markdown import markdown_page, markdown_report
from sdxl_trt.benchmarks.report.pages import html_page, write_pages
from sdxl_trt.benchmarks.report.records import (
    BenchReport, BenchSettings, ColdStart, Contestant, Measurement, Quality, Ratio, read_report,
)
from sdxl_trt.benchmarks.report.style import LIGHT

__all__ = [
    "LIGHT", "SAID", "BenchReport", "BenchSettings", "ColdStart", "Contestant", "Measurement", "Quality", "Ratio",
    "Section", "Table", "axes_of", "coloured", "drawn", "html_page", "markdown_page", "markdown_report", "read_report",
    "require_matplotlib", "styled", "write_pages",
]
