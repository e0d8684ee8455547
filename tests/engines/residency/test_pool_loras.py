"""A pool loads a component again where its LoRAs have changed, and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest

from sdxl_trt.engines.adapters.scaled import Adapted
from sdxl_trt.engines.errors import CorruptError, IncompatibleError

Run = Callable[..., None]
LORAS = (("style", 0.8),)
"""What a pool hands through: it compares LoRAs, and does not look into them."""


def _worn(component: str, *loras: Any) -> Adapted:
    return Adapted(component, loras or LORAS)


@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_other_loras_replace_a_unet_instead_of_joining_it(make_pool, machine: Any, residency: str) -> None:
    with make_pool(residency) as pool:
        pool.phase("unet")
        pool.phase(_worn("unet"))
        pool.phase(_worn("unet", ("other", 1.0)))
        pool.phase("unet")
        assert pool.loads == ["unet"] * 4
        assert pool.swaps == 0
    assert machine.most_unets == 1


def test_equal_loras_load_nothing(make_pool, machine: Any) -> None:
    with make_pool("resident") as pool:
        (first,) = pool.phase(_worn("unet"))
        pool.phase("text_encoder")
        (again,) = pool.phase(_worn("unet"))
        assert first is again
        assert pool.loads == ["unet", "text_encoder"]
        assert pool.holds(_worn("unet"))
        assert not pool.holds("unet")
        assert pool.holds("text_encoder")


def test_only_the_components_that_changed_are_loaded_again(make_pool, machine: Any, run: Run) -> None:
    with make_pool("resident") as pool:
        run(pool)
        before = len(pool.loads)
        pool.phase("text_encoder")
        pool.phase(_worn("unet"))
        pool.phase("refiner_unet")
        pool.phase("vae_decoder")
        assert pool.loads[before:] == ["unet"]


def test_an_engine_is_adapted_before_anything_of_it_is_read(make_pool, machine: Any) -> None:
    with make_pool("swap") as pool:
        pool.phase("text_encoder", next_engines=(_worn("unet"),))
        (engine,) = pool.phase(_worn("unet"))
        assert engine.loras == LORAS
    wanted = [event for event in machine.events if event.split()[0] in {"adapt", "prefetch", "load"}]
    assert [event.split()[0] for event in wanted if " unet" in event] == ["adapt", "prefetch", "load"]


def test_what_was_read_ahead_for_other_loras_gets_those_of_the_phase(make_pool) -> None:
    with make_pool("swap") as pool:
        pool.phase("text_encoder", next_engines=(_worn("unet"),))
        (engine,) = pool.phase("unet")
        assert engine.loras == ()


def test_loras_that_do_not_fit_leave_the_engine_as_it_was(make_pool, machine: Any) -> None:
    with make_pool("resident") as pool:
        pool.phase("unet")
        machine.errors["adapt unet ('style', 0.8)"] = CorruptError("another model")
        with pytest.raises(CorruptError, match="another model"):
            pool.phase(_worn("unet"))
        assert pool.holds("unet")
        assert pool.phase("unet")
        assert pool.loads == ["unet"]


def test_loras_that_do_not_fit_are_refused_before_a_phase(make_pool, machine: Any) -> None:
    with make_pool("resident") as pool:
        pool.phase("unet")
        machine.errors["adapt refiner_unet ('style', 0.8)"] = IncompatibleError("changes a bias")
        pool.check(["unet", _worn("unet")])
        with pytest.raises(IncompatibleError, match="changes a bias"):
            pool.check([_worn("unet"), _worn("refiner_unet")])
        assert pool.holds("unet")
        assert pool.loads == machine.loaded == ["unet"]


def test_an_engine_whose_loras_fail_to_load_is_gone_and_comes_back(make_pool, machine: Any) -> None:
    with make_pool("resident") as pool:
        pool.phase("unet")
        machine.errors["load unet"] = CorruptError("NaN")
        with pytest.raises(CorruptError, match="NaN"):
            pool.phase(_worn("unet"))
        assert machine.loaded == []
        assert not pool.holds(_worn("unet"))
        machine.errors.clear()
        (engine,) = pool.phase("unet")
        assert engine.loras == ()
        assert machine.loaded == ["unet"]


def test_a_component_with_loras_is_kept_by_either_name(make_pool, machine: Any) -> None:
    with make_pool("resident") as pool:
        pool.phase(_worn("unet"))
        pool.phase("vae_decoder")
        pool.free(keep=(_worn("unet"),))
        assert machine.loaded == ["unet"]
        pool.free()
        assert machine.loaded == []
