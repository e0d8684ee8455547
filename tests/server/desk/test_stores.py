"""Files under tokens, rates of keys, and predicted seconds."""

from dataclasses import replace

import pytest

from sdxl_trt.server.desk.files import Files
from sdxl_trt.server.desk.plan.predict import MEGAPIXEL, SHALLOW_SHARE, Predictor, Work
from sdxl_trt.server.desk.rates import Rates
from sdxl_trt.server.refusals import TooMany


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_file_is_there_for_its_lifetime_and_under_its_token_only() -> None:
    clock = Clock()
    files = Files(lifetime=60.0, clock=clock)
    token = files.put(b"png", "image/png", "key:1")
    assert len(token) == 32
    stored = files.get(token)
    assert stored is not None
    assert (stored.data, stored.media_type, stored.who) == (b"png", "image/png", "key:1")
    assert files.get("../" + token) is None
    clock.now += 60.0
    assert files.get(token) is None
    assert files.bytes == 0


def test_the_oldest_files_make_room() -> None:
    files = Files(most=10)
    tokens = [files.put(b"1234", "image/png") for _ in range(3)]
    assert [files.get(token) is not None for token in tokens] == [False, True, True]
    assert files.bytes == 8
    assert files.get(files.put(b"x" * 11, "image/png")) is None
    assert files.bytes == 0


def test_requests_beyond_the_rate_are_told_when_to_come_again() -> None:
    clock = Clock()
    rates = Rates(requests=3, clock=clock)
    for _ in range(3):
        rates.take("a", 1.0)
    with pytest.raises(TooMany) as refused:
        rates.take("a", 1.0)
    assert refused.value.retry_after == 20
    rates.take("b", 1.0)
    clock.now += 20.0
    rates.take("a", 1.0)
    allowance = rates.allowance("a")
    assert allowance is not None
    assert (allowance.limit, allowance.remaining) == (3, 0)
    assert allowance.reset == pytest.approx(60.0)


def test_seconds_beyond_the_rate_are_refused_and_given_back() -> None:
    clock = Clock()
    rates = Rates(seconds=30.0, clock=clock)
    rates.take("a", 25.0)
    with pytest.raises(TooMany) as refused:
        rates.take("a", 10.0)
    assert refused.value.retry_after == 10
    rates.give_back("a", 25.0)
    rates.take("a", 100.0)  # more than a minute's: taken from a full bucket, which owes the rest
    clock.now += 60.0
    with pytest.raises(TooMany):
        rates.take("a", 10.0)
    assert rates.allowance("a") is None


def test_seconds_are_learned_by_size_and_guessed_for_others() -> None:
    predictor = Predictor()
    guessed = predictor.cost(Work(MEGAPIXEL, 1, 24, 6))
    assert guessed.total == pytest.approx(0.1 + 30 * 0.5 + 1.0)
    for _ in range(30):
        predictor.observe("base", MEGAPIXEL, 0.04)
        predictor.observe("base", MEGAPIXEL // 4, 0.02)
    learned = predictor.cost(Work(MEGAPIXEL, 2, 24, 0))
    assert learned.base == pytest.approx(2 * 24 * 0.04)
    assert predictor.cost(Work(MEGAPIXEL // 4, 1, 10, 0)).base == pytest.approx(0.2)
    assert predictor.cost(Work(2 * MEGAPIXEL, 1, 1, 0)).base == pytest.approx(0.08)


def test_shallow_steps_count_as_a_part_of_full_ones_until_one_was_measured() -> None:
    predictor = Predictor()
    cached = Work(MEGAPIXEL, 2, 20, 6, base_shallow=8, refiner_shallow=2)
    predictor.observe("base", MEGAPIXEL, 0.1)
    guessed = predictor.cost(cached)
    assert guessed.base == pytest.approx(2 * (12 * 0.1 + 8 * SHALLOW_SHARE * 0.1))
    assert guessed.refiner == pytest.approx(2 * (4 * 0.5 + 2 * SHALLOW_SHARE * 0.5))
    predictor.observe("base_shallow", MEGAPIXEL, 0.01)
    learned = predictor.cost(cached)
    assert learned.base == pytest.approx(2 * (12 * 0.1 + 8 * 0.01))
    assert learned.refiner == guessed.refiner
    assert predictor.cost(Work(MEGAPIXEL, 2, 20, 6)).base == pytest.approx(2 * 20 * 0.1)
    assert predictor.cost(replace(cached, pixels=MEGAPIXEL // 2)).base == pytest.approx(learned.base / 2)


def test_a_change_of_engines_is_half_of_what_a_cycle_loads() -> None:
    predictor = Predictor()
    assert predictor.swap() == 0.0
    for name, seconds in (("base", 2.0), ("refiner", 1.0), ("decode", 1.0)):
        predictor.observe_load(name, seconds)
    assert predictor.swap() == 2.0
