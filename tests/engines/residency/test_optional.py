"""What only some runs use stays loaded in a resident pool, if all of it fits beside the rest."""

from functools import partial

import pytest

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.residency.policy import RESIDENCIES, estimate_memory, optional_components
from sdxl_trt.mini.embedded import bundle_path

MINI = read_bundle(bundle_path())


@pytest.mark.parametrize("provider", ["ort-cpu", "tensorrt"])
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_what_only_some_runs_use_may_stay_if_all_of_it_fits(residency: str, provider: str) -> None:
    def found(capacity: int | None) -> dict[str, int]:
        estimate = partial(estimate_memory, MINI, provider=provider, capacity=capacity)
        return optional_components(estimate(residency=residency), MINI.manifest, estimate)

    names = {"unet_shallow", "refiner_unet_shallow", "vae_encoder", "vae_tiny"} if residency == "resident" else set()
    every = found(None)
    assert every.keys() == names
    plan = estimate_memory(MINI, provider=provider, capacity=1 << 50, residency=residency)
    least = plan.peak + sum(every.values())
    share = 0.9 if provider == "tensorrt" else 0.8
    assert found(int(least / share) + 2) == every
    assert found(int(least / share) - 2) == {}
