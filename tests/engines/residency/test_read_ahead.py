"""Plans are read ahead in the order of use, never more of them than the limit allows, and only those expected."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.errors import CorruptError, IncompatibleError, ResourceError
from sdxl_trt.engines.residency.read_ahead import ReadAhead, bytes_ahead

NAMES = ("text_encoder", "unet", "refiner_unet", "vae_decoder")
SIZES = {"text_encoder": 10, "unet": 50, "refiner_unet": 45, "vae_decoder": 5}
WAIT = 20


class Reads:
    """Makes engines and lists their events; `hold` blocks a prefetch until it is released or its engine unloaded."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.events: list[str] = []
        self.errors: dict[str, BaseException] = {}
        self.hold: dict[str, threading.Event] = {}
        self.held: dict[int, int] = {}
        self.most = 0
        self.lock = threading.Lock()
        self.idle = threading.Event()

    def make(self, name: str) -> Any:
        if name == "impossible":
            raise IncompatibleError("no such plan")
        return Engine(name, self)

    def happens(self, event: str) -> None:
        with self.lock:
            self.events.append(event)


class Engine:
    def __init__(self, name: str, reads: Reads) -> None:
        self.name, self.reads, self.freed = name, reads, threading.Event()

    def prefetch(self) -> None:
        reads = self.reads
        with reads.lock:  # freed before or after this, and not between
            if self.freed.is_set():
                return  # what is read then goes with the engine, to which nothing refers
            reads.held[id(self)] = reads.sizes[self.name]
            reads.most = max(reads.most, sum(reads.held.values()))
        reads.happens(f"read {self.name}")
        gate = reads.hold.get(self.name)
        while gate is not None and not gate.wait(0.001) and not self.freed.is_set():
            pass
        if self.name in reads.errors:
            raise reads.errors[self.name]

    def unload(self) -> None:
        with self.reads.lock:
            self.freed.set()
            self.reads.held.pop(id(self), None)
        self.reads.happens(f"free {self.name}")


@pytest.fixture
def reads() -> Iterator[Reads]:
    before = threading.active_count()
    yield Reads(SIZES)
    assert threading.active_count() == before, "the thread outlived `close`"


@pytest.fixture
def ahead(reads: Reads) -> Iterator[Callable[[int], ReadAhead]]:
    made: list[ReadAhead] = []

    def make(limit: int) -> ReadAhead:
        made.append(ReadAhead(reads.make, SIZES, limit))
        return made[0]

    yield make
    made[0].close()
    assert reads.held == {}, "everything was given up"


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does next."""
    turn = threading.Event()
    for _ in range(WAIT * 1000):
        if condition():
            return
        turn.wait(0.001)
    raise AssertionError("it did not happen")


def done(ahead: ReadAhead, reads: Reads, name: str) -> None:
    """Load and free a component as a pool does."""
    engine = ahead.take(name)
    ahead.loaded(name)
    engine.unload()


def test_plans_are_read_in_the_order_of_use_until_the_limit(ahead: Any, reads: Reads) -> None:
    plans = ahead(70)
    plans.expect(NAMES)
    until(lambda: len(reads.events) == 2)
    assert reads.events == ["read text_encoder", "read unet"], "the refiner's 45 do not fit beside 60"
    done(plans, reads, "text_encoder")
    unet = plans.take("unet")
    assert plans.order == ("refiner_unet", "vae_decoder")
    assert "read refiner_unet" not in reads.events, "the base counts until it is loaded"
    plans.loaded("unet")
    unet.unload()
    until(lambda: reads.events[-1:] == ["read vae_decoder"])
    assert plans.peak == 60
    assert reads.most <= 70


def test_a_plan_that_fits_does_not_overtake_one_that_does_not(ahead: Any, reads: Reads) -> None:
    plans = ahead(56)
    plans.expect(("unet", "refiner_unet", "vae_decoder"))
    until(lambda: reads.events == ["read unet"])
    plans.take("unet").unload()
    assert reads.events == ["read unet", "free unet"]
    plans.loaded("unet")
    until(lambda: reads.events[-2:] == ["read refiner_unet", "read vae_decoder"])


def test_an_error_is_raised_at_its_own_engine(ahead: Any, reads: Reads) -> None:
    reads.errors["refiner_unet"] = CorruptError("the refiner's plan is damaged")
    plans = ahead(1000)
    plans.expect(NAMES)
    until(lambda: "read vae_decoder" in reads.events)
    for name in ("text_encoder", "unet"):
        done(plans, reads, name)
    with pytest.raises(CorruptError, match="the refiner's plan is damaged"):
        plans.take("refiner_unet")
    assert "free refiner_unet" in reads.events
    reads.errors.clear()
    done(plans, reads, "refiner_unet")
    done(plans, reads, "vae_decoder")


def test_a_damaged_plan_that_is_passed_over_is_a_warning(
    ahead: Any, reads: Reads, caplog: pytest.LogCaptureFixture
) -> None:
    reads.errors["unet"] = CorruptError("the base's plan is damaged")
    plans = ahead(1000)
    plans.expect(NAMES)
    until(lambda: "read vae_decoder" in reads.events)
    done(plans, reads, "refiner_unet")
    assert caplog.messages == ["the base's plan is damaged"]
    assert "free text_encoder" in reads.events


def test_short_memory_is_a_warning_and_the_phase_reads_itself(
    ahead: Any, reads: Reads, caplog: pytest.LogCaptureFixture
) -> None:
    reads.errors["unet"] = ResourceError("out of host memory")
    plans = ahead(1000)
    plans.expect(("unet", "refiner_unet"))
    until(lambda: "read refiner_unet" in reads.events)
    assert caplog.messages == ["unet was not read ahead: out of host memory"]
    done(plans, reads, "unet")


def test_an_engine_that_cannot_be_made_is_an_error_at_its_turn(ahead: Any, reads: Reads) -> None:
    plans = ahead(1000)
    plans.expect(("impossible", "unet"))
    until(lambda: reads.events == ["read unet"])
    with pytest.raises(IncompatibleError):
        plans.take("impossible")


def test_a_plan_that_is_no_longer_expected_is_given_up_while_it_is_read(ahead: Any, reads: Reads) -> None:
    reads.hold["refiner_unet"] = threading.Event()
    plans = ahead(1000)
    plans.expect(NAMES)
    until(lambda: reads.events[-1:] == ["read refiner_unet"])
    plans.expect(("text_encoder", "unet", "vae_decoder"))
    until(lambda: reads.events[-1:] == ["read vae_decoder"])
    assert "free refiner_unet" in reads.events
    assert reads.events.count("read unet") == 1, "what is still expected stays"


def test_an_engine_is_taken_while_its_plan_is_read(ahead: Any, reads: Reads) -> None:
    reads.hold["unet"] = threading.Event()
    plans = ahead(1000)
    plans.expect(("unet", "refiner_unet"))
    until(lambda: reads.events == ["read unet"])
    engine = plans.take("unet")
    assert engine.name == "unet"
    assert reads.events == ["read unet"]
    reads.hold["unet"].set()
    until(lambda: reads.events[-1:] == ["read refiner_unet"])
    plans.loaded("unet")
    engine.unload()


def test_a_plan_out_of_turn_takes_the_place_of_those_needed_last(ahead: Any, reads: Reads) -> None:
    plans = ahead(60)
    plans.expect(("text_encoder", "unet"))
    until(lambda: len(reads.events) == 2)
    engine = plans.take("refiner_unet")
    assert reads.events[2:] == ["free unet"], "45 beside the first encoder's 10"
    plans.loaded("refiner_unet")
    until(lambda: reads.events[-1:] == ["read unet"])
    engine.unload()


def test_a_component_may_be_used_twice(ahead: Any, reads: Reads) -> None:
    plans = ahead(1000)
    plans.expect(("unet", "refiner_unet", "unet"))
    until(lambda: len(reads.events) == 2)
    done(plans, reads, "unet")
    until(lambda: reads.events.count("read unet") == 2)
    done(plans, reads, "refiner_unet")
    done(plans, reads, "unet")


def test_closing_gives_up_what_is_being_read(ahead: Any, reads: Reads) -> None:
    reads.hold["unet"] = threading.Event()
    plans = ahead(1000)
    plans.expect(NAMES)
    until(lambda: reads.events[-1:] == ["read unet"])
    plans.close()
    assert sorted(event for event in reads.events if event.startswith("free"))[0] == "free text_encoder"
    plans.expect(NAMES)  # no thread starts again


@given(
    order=st.lists(st.sampled_from(NAMES), min_size=1, max_size=8),
    taken=st.lists(st.sampled_from(NAMES), max_size=6),
    limit=st.integers(0, 120),
)
@settings(max_examples=40, deadline=None)
def test_the_limit_holds_in_any_order(order: list[str], taken: list[str], limit: int) -> None:
    reads = Reads(SIZES)
    plans = ReadAhead(reads.make, SIZES, limit)
    plans.expect(order)
    for name in taken:
        done(plans, reads, name)
    plans.close()
    assert plans.limit == max(limit, 50)
    assert plans.peak <= plans.limit
    assert reads.held == {}


def test_half_of_the_memory_but_at_least_the_largest_plan() -> None:
    sizes = (5, 50, 45)
    assert bytes_ahead(sizes, 1000) == 100
    assert bytes_ahead(sizes, 140) == 70
    assert bytes_ahead(sizes, 20) == bytes_ahead(sizes, None) == 50
    assert bytes_ahead((), 1000) == 0
