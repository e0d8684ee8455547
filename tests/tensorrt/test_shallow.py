"""The real TensorRT takes every shallow graph: as exported, with inputs for LoRAs, and in 8 bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from sdxl_trt.benchmarks.full_size.exporters import quantize_unets
from sdxl_trt.engines.build.process import BuildJob, build_plan
from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.plans.sizes import profiles_of, rank_range, stage_sizes
from sdxl_trt.mini.embedded import bundle_path

Run = Callable[..., tuple[int, dict[str, Any]]]
pytestmark = pytest.mark.usefixtures("tensorrt")
RANK = 8


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, RANK])
def test_a_plan_of_a_shallow_unet_is_small(tmp_path: Path, lora_rank: int) -> None:
    bundle = read_bundle(bundle_path())
    component = bundle.manifest.components["unet_shallow"]
    graph = component.planned_graph(lora_rank)
    assert graph is not None
    profiles = profiles_of(component, stage_sizes(bundle.manifest), bundle.manifest.base.vae.factor)
    built = build_plan(
        BuildJob(
            component="unet_shallow",
            graph=bundle.path(graph),
            profiles=profiles,
            lora_rank=rank_range(lora_rank) if lora_rank else None,
            flavour="tensorrt-rtx",
            plan=tmp_path / "plan",
            log=tmp_path / "log",
        )
    )
    assert "[E]" not in (tmp_path / "log").read_text()
    assert 0.9 * component.used_bytes <= built.weights <= 1.5 * component.used_bytes < component.weights.size / 10


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_shallow_graphs_in_8_bits_are_accepted(run_parser: Run, tmp_path: Path, scheme: Literal["int8", "fp8"]) -> None:
    bundle = quantize_unets(bundle_path(), scheme, tmp_path / "bundle")
    parts = [part for part in bundle.manifest.components.values() if part.kind == "shallow_unet"]
    assert len(parts) == 2
    graphs = [record for part in parts for record in (part.graph, part.slot_graph) if record is not None]
    code, report = run_parser(*map(bundle.path, graphs))
    assert code == 0, report
    assert [graph["errors"] + graph["unknown"] for graph in report["parsed"]] == [[]] * 4
