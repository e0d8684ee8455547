"""Plans of a UNet with residual inputs and of a ControlNet, built by the real builder."""

from pathlib import Path

import msgspec
import pytest

from sdxl_trt.engines.build.process import BuildJob, build_plan
from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.plans.sizes import profiles_of, stage_sizes

pytestmark = pytest.mark.usefixtures("tensorrt")


@pytest.mark.parametrize("name", [pytest.param("unet", marks=pytest.mark.slow), "controlnet"])
def test_residuals_may_be_of_one_pixel_or_of_all(controlled: Path, tmp_path: Path, name: str) -> None:
    manifest = read_bundle(controlled).manifest
    component = manifest.components[name]
    sizes = msgspec.structs.replace(stage_sizes(manifest), static=True)
    profiles = profiles_of(component, sizes, manifest.base.vae.factor)[-1:]
    (low, usual, high) = profiles[0].shapes["mid_residual" if name == "unet" else "earlier_mid_residual"]
    assert (low, usual, high) == ((1, 144, 1, 1), (2, 144, 4, 4), (2, 144, 4, 4))
    job = BuildJob(
        component=name,
        graph=controlled / component.graph.file,
        profiles=profiles,
        flavour="tensorrt-rtx",
        plan=tmp_path / f"{name}.plan",
        log=tmp_path / f"{name}.log",
    )
    built = build_plan(job)
    assert built.plan.stat().st_size == built.size > 0
    assert built.activations > 0
