"""A trt-bench report with every kind of record and made-up figures."""

import pytest

from sdxl_trt.benchmarks.contest.ratios import ratios
from sdxl_trt.benchmarks.measure.bars import Bar
from sdxl_trt.benchmarks.report.records import BenchReport, BenchSettings, ColdStart, Contestant, Measurement, Quality

OURS = "sdxl-trt"
STAGES = {"text encoders": 0.03, "base UNet": 0.7, "handoff": 0.01, "refiner UNet": 0.18, "VAE decode": 0.08}


@pytest.fixture(scope="session")
def settings() -> BenchSettings:
    return BenchSettings(
        bundle="bundle", model="a model", width=64, height=64, batch=1, steps=10, handoff=0.8, guidance=5.0, seed=7,
        tokens=77, runs=3, warmups=1, threads=2, prompt="a red star",
    )  # fmt: skip


def _runs(seconds: float) -> tuple[float, ...]:
    return (seconds * 0.99, seconds, seconds * 1.03)


def _timed(contestant: str, pace: float) -> list[Measurement]:
    """Return a picture, a step and three sweeps of a contestant that takes `pace` seconds per picture."""

    def picture(
        share: float = 1.0, side: int = 64, batch: int = 1, handoff: float | None = 0.8, sweep: str = ""
    ) -> Measurement:
        stages = {stage: part * pace for stage, part in STAGES.items()}
        return Measurement(
            contestant=contestant, what="picture", width=side, height=side, batch=batch, seconds=_runs(pace * share),
            pictures=batch, handoff=handoff, sweep=sweep, stages={} if sweep else stages,
        )  # fmt: skip

    step = Measurement(
        contestant=contestant, what="base UNet step", width=64, height=64, batch=1, rows=2, seconds=_runs(pace / 10),
        difference=1.5e-6, joules=0.25,
    )  # fmt: skip
    return [
        picture(), step,
        picture(0.3, side=32, sweep="size"), picture(1.01, sweep="size"),
        picture(1.02, sweep="batch"), picture(1.9, batch=2, sweep="batch"),
        picture(0.8, handoff=0.25, sweep="handoff"), picture(1.1, handoff=None, sweep="handoff"),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def report(settings: BenchSettings) -> BenchReport:
    measured = [*_timed(OURS, 0.513), *_timed("eager", 1.027)]
    return BenchReport(
        command=("trt-bench", "--engines", "a folder"),
        machine={"processor": "a processor", "cores": 2, "memory_bytes": 16_000_000_000},
        versions={"sdxl-trt": "0.1.0", "torch": "2.13.0"},
        settings=settings,
        contestants=(
            Contestant(name=OURS, title="sdxl-trt", precision="fp32", import_seconds=0.211, load_seconds=0.343,
                       peak_rss=612_000_000, peak_gpu=1_230_000_000, command=("python", "-m", "ours")),
            Contestant(name="eager", title="PyTorch eager", precision="fp32", import_seconds=3.11, load_seconds=1.42,
                       compile_seconds=94.3, peak_rss=1_720_000_000, not_run={"VAE decode": "it has none"}),
            Contestant(name="openvino", title="OpenVINO", precision="", missing="there is no environment of peers"),
        ),
        measurements=tuple(measured),
        ratios=tuple(ratios(measured, OURS)),
        floors={"base UNet step": 0.0301},
        cold_starts=(
            ColdStart(name="trt-generate", command=("trt-generate", "a b"), seconds=_runs(2.34), peak_rss=391_000_000),
            ColdStart(name="a script", command=("python", "x.py"), seconds=_runs(9.87), peak_rss=1_560_000_000),
            ColdStart(name="another", command=(), seconds=(), peak_rss=0, missing="it failed"),
        ),
        quality=(
            Quality(variant="fp32", stage="embeddings", psnr=None, limit=60.0),
            Quality(variant="fp32", stage="pixels", psnr=81.3, ssim=0.9987, score=0.913, limit=60.0),
            Quality(variant="broken", stage="embeddings", psnr=17.2, limit=60.0, passed=False),
            Quality(variant="broken", stage="pixels", psnr=None, limit=60.0, passed=False),
        ),
        bars=(Bar("a step", "<= 0.55 times", "0.50 times", True), Bar("a picture", "<= 0.4 times", "0.50 times", False),
              Bar("a GPU's step", "<= 1 times", "not measured", None)),
        notes=("the machine was idle",),
    )  # fmt: skip


@pytest.fixture(scope="session")
def empty(settings: BenchSettings) -> BenchReport:
    return BenchReport(machine={}, versions={}, settings=settings)
