"""What a pool does where memory is short: it continues under another residency, or refuses the run."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from sdxl_trt.engines.bundle.phases import USUAL_RUN, Workload
from sdxl_trt.engines.bundle.profile import Range
from sdxl_trt.engines.errors import ResourceError
from sdxl_trt.engines.plans.limits import PlanLimits
from sdxl_trt.engines.plans.shapes import RunSizes
from sdxl_trt.engines.residency.estimate import MemoryEstimate, PhaseEstimate
from sdxl_trt.engines.residency.needs import Need

GB = 10**9
UNETS = ("unet", "refiner_unet")
Run = Callable[..., None]


def _full(machine: Any, room: int, streamed: bool = False) -> None:
    """Leave room for `room` engines; if `streamed`, a UNet fits only with a weight budget."""

    def refuses(name: str) -> bool:
        small = name not in UNETS or not streamed or name in machine.budgets
        return len(machine.loaded) >= room or not small

    machine.refuses = refuses


@pytest.mark.parametrize("ahead", [True, False])
def test_out_of_memory_under_resident_continues_with_swap(
    make_pool, machine: Any, ahead: bool, caplog: pytest.LogCaptureFixture, run: Run
) -> None:
    _full(machine, room=1)
    with make_pool("resident", keeps=UNETS, fallbacks=("swap", "stream")) as pool:
        pool.phase("unet", next_engines=("refiner_unet",) if ahead else ())
        pool.phase("refiner_unet", next_engines=("vae_decoder",))
        assert (pool.residency, machine.loaded, pool.swaps) == ("swap", ["refiner_unet"], 1)
        run(pool)
        assert machine.most_unets == 1
    expected = "residency resident: loading refiner_unet: out of memory; continuing with swap"
    assert caplog.messages == [expected]
    assert caplog.records[0].levelno == logging.WARNING


def test_out_of_memory_under_swap_continues_with_stream(
    make_pool, machine: Any, caplog: pytest.LogCaptureFixture, run: Run
) -> None:
    _full(machine, room=1, streamed=True)
    budgets = {"unet": 700, "refiner_unet": 600}
    with make_pool("resident", fallbacks=("swap", "stream"), budgets=budgets) as pool:
        run(pool)
        assert (pool.residency, machine.budgets) == ("stream", budgets)
        assert pool.swaps == 1
    assert len(caplog.messages) == 2
    assert machine.loaded == []


def test_an_engine_loaded_whole_is_loaded_again_with_its_budget(make_pool, machine: Any) -> None:
    machine.refuses = lambda name: name == "refiner_unet" and name not in machine.budgets
    budgets = {"unet": 700, "refiner_unet": 600}
    with make_pool("swap", fallbacks=("stream",), budgets=budgets) as pool:
        pool.phase(*UNETS)
        assert machine.budgets == budgets
        assert machine.events[:2] == ["load unet", "unload refiner_unet"]
        assert machine.loaded == list(UNETS)


@pytest.mark.parametrize("fallbacks", [(), ("swap",), ("swap", "stream")])
def test_out_of_memory_under_the_last_policy_is_an_error(make_pool, machine: Any, fallbacks: tuple[str, ...]) -> None:
    _full(machine, room=0)
    pool = make_pool("resident", fallbacks=fallbacks)
    with pool, pytest.raises(ResourceError, match="loading unet: out of memory"):
        pool.phase("unet")
    assert machine.loaded == []


def _estimates(fits: dict[str, int], usual: int = 5) -> Callable[..., MemoryEstimate]:
    """Return a stand-in for `estimate_memory`, exact figures on a device of 10 GB: the peak of each residency."""

    def estimate(*, residency: str, run: RunSizes | None = None, workload: Workload = USUAL_RUN) -> MemoryEstimate:
        assert workload == USUAL_RUN
        peak = GB * (usual if run is None else fits[residency])
        phase = PhaseEstimate(name="base", components=("unet",), loaded=("unet",), peak=peak)
        return MemoryEstimate(
            provider="tensorrt", capacity=10 * GB, usable=9 * GB, residency=residency, reason="", needs=(),
            phases=(phase,), peak=peak, keeps=UNETS if residency == "resident" else (), missing=max(peak - 9 * GB, 0),
        )  # fmt: skip

    return estimate


RECORDS = {"unet": SimpleNamespace(file=SimpleNamespace(size=1))}
RUN_SIZES = RunSizes(height=512, width=768, rows=2, tokens=154)
SIDES = Range(min=512, opt=1024, max=1280)
LIMITS = PlanLimits(height=SIDES, width=SIDES, pictures=1, tokens=Range(min=77, opt=77, max=231))


@pytest.mark.parametrize(
    ("peaks", "residency", "left"),
    [((9, 8, 7), "resident", ("swap", "stream")), ((10, 9, 7), "swap", ("stream",)), ((30, 20, 9), "stream", ())],
)
def test_a_run_gets_the_first_residency_that_it_fits(
    make_pool, machine: Any, peaks: tuple[int, ...], residency: str, left: tuple[str, ...]
) -> None:
    estimate = _estimates(dict(zip(("resident", "swap", "stream"), peaks, strict=True)))
    options = {"fallbacks": ("swap", "stream"), "estimate": estimate, "records": RECORDS, "limits": LIMITS}
    with make_pool("resident", **options) as pool:
        pool.phase("vae_decoder")
        pool.make_room(RUN_SIZES)
        assert (pool.residency, pool._fallbacks) == (residency, left)
        assert machine.loaded == ["vae_decoder"]  # another run may be using it
        pool.phase("unet")
        # The run fits only if the small components are freed.
        assert machine.loaded == ["unet"]


def test_what_a_run_needs_is_reserved_when_its_engines_load(make_pool, machine: Any) -> None:
    """So memory that other programs hold is missed while the pool can still fall back."""
    need = Need(component="unet", weights=0, activations=700, largest=700, io=0)
    estimate = _estimates({"resident": 5, "swap": 5})

    def with_need(**options: Any) -> MemoryEstimate:
        return msgspec.structs.replace(estimate(**options), needs=(need,))

    options = {"fallbacks": ("swap",), "estimate": with_need, "records": RECORDS, "limits": LIMITS}
    with make_pool("resident", activations={"unet": 300}, **options) as pool:
        pool.phase("unet")
        assert machine.events[-2:] == ["load unet", "reserve 300 for unet"]
        pool.make_room(RUN_SIZES)
        pool.free()
        machine.errors["reserve 700 for unet"] = ResourceError("out of memory")
        with pytest.raises(ResourceError):
            pool.phase("unet")
        assert pool.residency == "swap"
        assert machine.loaded == []


def test_a_smaller_budget_takes_effect_with_the_next_phase(make_pool, machine: Any) -> None:
    """A loaded engine cannot change its budget, and until then another run may use it."""
    estimate = _estimates({"stream": 5})

    def with_budget(**options: Any) -> MemoryEstimate:
        return msgspec.structs.replace(estimate(**options), budgets={"unet": 20})

    options = {"budgets": {"unet": 50}, "estimate": with_budget, "records": RECORDS, "limits": LIMITS}
    with make_pool("stream", **options) as pool:
        pool.phase("unet")
        pool.make_room(RUN_SIZES)
        assert (machine.loaded, machine.budgets) == (["unet"], {"unet": 50})
        pool.phase("unet")
        assert (machine.loaded, machine.budgets) == (["unet"], {"unet": 20})


@pytest.mark.parametrize(("peak", "stays"), [(5, True), (6, False)])
def test_what_only_some_runs_use_stays_while_it_fits(make_pool, machine: Any, peak: int, *, stays: bool) -> None:
    estimate = _estimates({"resident": peak})
    options = {"estimate": estimate, "records": RECORDS, "limits": LIMITS, "optional": {"vae_decoder": 4 * GB}}
    with make_pool("resident", keeps=UNETS, **options) as pool:
        pool.phase("vae_decoder")
        pool.phase("unet")
        assert machine.loaded == ["vae_decoder", "unet"]
        pool.make_room(RUN_SIZES)  # of 9 GB
        pool.phase("unet")
        assert machine.loaded == (["vae_decoder", "unet"] if stays else ["unet"])


def test_room_is_checked_without_any_change(make_pool, machine: Any) -> None:
    """Another thread may do so while a run goes on."""
    options = {"fallbacks": ("swap",), "estimate": _estimates({"resident": 12, "swap": 8}), "records": RECORDS}
    with make_pool("resident", limits=LIMITS, **options) as pool:
        pool.phase("unet")
        pool.check_room(RUN_SIZES)
        assert (pool.residency, pool._fallbacks, machine.loaded) == ("resident", ("swap",), ["unet"])
        pool.make_room(RUN_SIZES)
        assert pool.residency == "swap"


def test_a_run_that_fits_nowhere_is_refused_with_the_size_that_fits(make_pool, machine: Any) -> None:
    options = {"estimate": _estimates({"swap": 12}), "records": RECORDS, "limits": LIMITS}
    with make_pool("swap", **options) as pool, pytest.raises(ResourceError) as raised:
        pool.make_room(RUN_SIZES)
    with make_pool("swap", **options) as pool, pytest.raises(ResourceError, match=r"needs 7\.00 GB less"):
        pool.check_room(RUN_SIZES)
    assert str(raised.value) == (
        "768x512 with 154 tokens: tensorrt, residency swap: base needs 12.00 GB, 3.00 GB more than the 9.00 GB"
        " that is usable; the plans' usual size, 1024x1024 with 77 tokens, needs 7.00 GB less"
    )
    options["estimate"] = _estimates({"swap": 12}, usual=11)
    with make_pool("swap", **options) as pool, pytest.raises(ResourceError, match="usable; build the plans with"):
        pool.make_room(RUN_SIZES)
    assert machine.events == []


def test_without_plans_nothing_is_refused(make_pool) -> None:
    with make_pool("swap", estimate=_estimates({"swap": 12})) as pool:
        pool.make_room(RUN_SIZES)
