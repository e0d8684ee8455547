"""What a bundle's builds are asked for, and what its manifest records of them; no builder runs."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sdxl_trt.engines.build import bundle_plans
from sdxl_trt.engines.build.bundle_plans import build_plans
from sdxl_trt.engines.build.messages import BuildJob, BuiltPlan
from sdxl_trt.engines.bundle.plan_record import ANY, Chunks, Environment, PlanMemory
from sdxl_trt.mini.embedded import bundle_path

HERE = Environment(
    flavour="tensorrt", tensorrt="11.4", gpu="G", compute_capability="8.9", driver="1", platform="linux-x86_64"
)
SHARED = "sdxl-trt/timing/G-8.9-11.4.cache"


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that builds the UNet's plan, and returns the job that the builder got and the new record."""
    jobs: list[BuildJob] = []

    def built(job: BuildJob, progress: Any) -> BuiltPlan:
        jobs.append(job)
        job.plan.write_bytes(b"plan")
        return BuiltPlan(
            component=job.component, plan=job.plan, size=4, sha256="0" * 64, activations=30, weights=9, streamable=0,
            seconds=1.0, parse_seconds=0.5, layers=1, peak_anonymous=0, peak_file=0, profile_activations=(10, 20, 30),
            chunks=Chunks(size=4, sha256=("0" * 64,)),
        )  # fmt: skip

    def run(environment: Environment = HERE, **options: Any) -> tuple[BuildJob, Any]:
        monkeypatch.setattr(bundle_plans, "current_environment", lambda _: environment)
        bundle = build_plans(root, environment.flavour, components=["unet"], force=True, **options)
        return jobs[-1], bundle.manifest.plans[-1]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bundle_plans, "build_plan", built)
    root = shutil.copytree(bundle_path(), tmp_path / "bundle")
    return run


def test_builds_share_a_timing_cache_by_default(build: Any, tmp_path: Path) -> None:
    job, _ = build()
    assert (job.timing_cache, job.shared_cache) == (tmp_path / "cache" / SHARED, True)
    job, _ = build(timing_cache=tmp_path / "mine.cache")
    assert (job.timing_cache, job.shared_cache) == (tmp_path / "mine.cache", False)
    job, _ = build(timing_cache=False)
    assert job.timing_cache is None
    rtx = msgspec.structs.replace(HERE, flavour="tensorrt-rtx", gpu=ANY, compute_capability=ANY, driver=ANY)
    job, _ = build(rtx)
    assert job.timing_cache is None


def test_the_manifest_records_the_activations_of_each_profile(build: Any) -> None:
    job, record = build()
    assert record.key.profiles == job.profiles
    assert len(job.profiles) == 3
    assert record.memory == PlanMemory(weights=9, activations=30, profile_activations=(10, 20, 30))
