"""Shared by all measurements: processes, energy, subjects, bars and result files."""

from sdxl_trt.benchmarks.measure.bars import NOT_MEASURED, VERDICTS, Bar, at_least, at_most, bars_table, missed
from sdxl_trt.benchmarks.measure.energy import Nvml
from sdxl_trt.benchmarks.measure.gpu import FLAVOURS, gpu_extras, gpu_facts, no_driver
from sdxl_trt.benchmarks.measure.gpu_record import CheckResult, Figure, GpuReport, Outcome, Unit, read_gpu_report
from sdxl_trt.benchmarks.measure.processes import Measured, load_average, machine, measure
from sdxl_trt.benchmarks.measure.results import (
    RESULTS_FOLDER, machine_words, package_versions, results_parser, write_json, write_results, write_text,
)
from sdxl_trt.benchmarks.measure.subjects import Say, Subject, bench_cache, find_subject

__all__ = [
    "FLAVOURS", "NOT_MEASURED", "RESULTS_FOLDER", "VERDICTS", "Bar", "CheckResult", "Figure", "GpuReport", "Measured",
    "Nvml", "Outcome", "Say", "Subject", "Unit", "at_least", "at_most", "bars_table", "bench_cache", "find_subject",
    "gpu_extras", "gpu_facts", "load_average", "machine", "machine_words", "measure", "missed", "no_driver",
    "package_versions", "read_gpu_report", "results_parser", "write_json", "write_results", "write_text",
]
