"""trt-bench: contestants take turns on the same inputs."""

from sdxl_trt.benchmarks.contest.bars import bench_bars
from sdxl_trt.benchmarks.contest.bench import BenchOptions, run_bench, settled_spec
from sdxl_trt.benchmarks.contest.cold_start import cold_starts
from sdxl_trt.benchmarks.contest.ratios import agree
from sdxl_trt.benchmarks.contest.roster import PRESETS, ROSTER

__all__ = ["PRESETS", "ROSTER", "BenchOptions", "agree", "bench_bars", "cold_starts", "run_bench", "settled_spec"]
