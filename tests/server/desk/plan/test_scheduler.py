"""What runs next, on a clock that is only counted."""

import importlib.util
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from sdxl_trt.server.desk.plan.scheduler import Scheduler
from sdxl_trt.server.desk.plan.tasks import Action, Cost, Policy, Task, Times


def _simulation() -> ModuleType:
    name = "desk_simulation"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("simulation.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


sim = _simulation()
COST: Cost = sim.COST
C = COST.total
GATED = Policy(wait=1e9, capped=False, extended=False)


def _task(who: str = "a", came: float = 0.0, **changes: object) -> Task:
    given = {"who": who, "cost": COST, "came": came, "base_key": "k", "refiner_key": "k", **changes}
    return Task(**given)  # type: ignore[arg-type]


def _run(scheduler: Scheduler, now: float, times: Times) -> Action:
    action = scheduler.next(now, times)
    assert action is not None
    scheduler.done(now)
    return action


def _kinds(scheduler: Scheduler, times: Times) -> list[str]:
    kinds = []
    while (action := scheduler.next(0.0, times)) is not None:
        kinds.append(f"{action.kind} {len(action.tasks)}")
        scheduler.done(0.0)
    return kinds


@pytest.mark.parametrize("swap", [0.2, 2.0])
@pytest.mark.parametrize("load", [0.3, 0.6, 0.8, 0.9])
def test_latency_and_cycles_follow_the_formulas_of_a_gated_service(swap: float, load: float) -> None:
    rate, count = load / C, 4000
    scheduler = Scheduler(GATED)
    result = sim.simulate(scheduler, sim.poisson(rate, count, seed=3), Times(swap))
    assert len(result.latencies) == count
    assert result.latency == pytest.approx(sim.predicted_latency(rate, swap), rel=0.1)
    assert scheduler.swaps <= 2 * scheduler.cycles


@pytest.mark.parametrize(("swap", "load"), [(0.2, 0.8), (2.0, 0.3), (2.0, 0.8)])
def test_the_usual_policy_is_no_slower_than_a_gated_service(swap: float, load: float) -> None:
    rate = load / C
    scheduler = Scheduler(Policy(wait=120.0))
    result = sim.simulate(scheduler, sim.poisson(rate, 2500, seed=4), Times(swap))
    assert result.latency <= 1.05 * sim.predicted_latency(rate, swap)
    assert scheduler.swaps <= 2 * scheduler.cycles


def test_a_cycle_lasts_two_swaps_and_its_pictures_in_the_long_run() -> None:
    rate = 0.9 / C
    result = sim.simulate(Scheduler(GATED), sim.poisson(rate, 4000, seed=5), Times(2.0))
    mean = sum(result.cycle_seconds) / len(result.cycle_seconds)
    assert mean == pytest.approx(2 * 2.0 / (1 - 0.9), rel=0.1)


@pytest.mark.parametrize(("swap", "count"), [(2.0, 10_000), (0.0, 2000)])
def test_nobody_waits_beyond_the_bound_in_ten_thousand_random_arrivals(swap: float, count: int) -> None:
    rng, now, tasks, wait = random.Random(6), 0.0, [], 40.0
    for _ in range(count):
        now += rng.expovariate(1.2 / C) * rng.choice((0.0, 1.0, 2.0))
        factor = rng.choice((0.3, 0.5, 1.0, 2.0))
        cost = Cost(*(factor * each for each in (COST.encode, COST.base, COST.refiner, COST.decode)))
        kind = rng.choice(("both", "both", "both", "base", "refiner"))
        tasks.append(
            _task(
                rng.choice("abc"),
                now,
                cost=replace(cost, base=cost.base * (kind != "refiner"), refiner=cost.refiner * (kind != "base")),
                base_key=None if kind == "refiner" else rng.choice("xy"),
                refiner_key=None if kind == "base" else rng.choice("xy"),
            )
        )
    scheduler, times = Scheduler(Policy(wait=wait)), Times(swap)
    result = sim.simulate(scheduler, tasks, times, lambda scheduler, task: scheduler.in_time(task, times))
    assert len(result.latencies) + len(result.refused) == len(tasks)
    assert len(result.latencies) > 0.6 * count
    assert 0.9 * wait < max(result.waits.values()) <= wait
    assert scheduler.swaps <= 2 * scheduler.cycles


def test_a_flooding_key_delays_another_by_at_most_the_bound_and_a_cycle() -> None:
    wait, times = 20.0, Times(2.0)
    scheduler = Scheduler(Policy(wait=wait))
    flood = sim.poisson(5.0, 5000, seed=7, who="flood")
    other = sim.poisson(0.1, 100, seed=8, who="other")
    result = sim.simulate(
        scheduler,
        sorted([*flood, *other], key=lambda task: task.came),
        times,
        lambda scheduler, task: task.who == "other" or sum(each.who == "flood" for each in scheduler.waiting) < 64,
    )
    assert len(result.refused) > 3000
    assert max(result.waits[task] for task in other) <= wait + max(result.cycle_seconds)
    assert max(result.cycle_seconds) <= wait
    assert max(result.waits[task] for task in flood if task in result.waits) > 3 * wait  # it did flood


def test_seconds_are_shared_equally_not_pictures() -> None:
    scheduler = Scheduler(Policy(wait=30 * C, capped=False, extended=False))
    small = replace(COST, base=COST.base / 4, refiner=COST.refiner / 4, decode=COST.decode / 4)
    for number in range(100):
        scheduler.add(_task("small", number * 1e-6, cost=small), 0.0)
        scheduler.add(_task("large", number * 1e-6), 0.0)
    action = _run(scheduler, 0.0, Times(0.01))
    seconds = {who: sum(task.seconds for task in action.tasks if task.who == who) for who in ("small", "large")}
    assert seconds["small"] == pytest.approx(seconds["large"], abs=2 * C)


def test_a_turn_that_nobody_used_is_not_saved() -> None:
    scheduler = Scheduler(Policy(wait=4.5 * C, capped=False, extended=False))
    for number in range(40):
        scheduler.add(_task("busy", number * 1e-6), 0.0)
    for _ in range(8):
        scheduler.next(0.0, Times(0.01))
        scheduler.done(0.0)
    scheduler.add(_task("new", 1.0), 1.0)
    scheduler.add(_task("new", 1.0), 1.0)
    order = [task.who for task, _ in scheduler.foreseen(Times(0.01))]
    assert order[:5].count("new") == 2


def test_pictures_of_one_order_do_not_hold_a_phase() -> None:
    scheduler = Scheduler(Policy(wait=6 * C, extended=False))
    for number in range(40):
        scheduler.add(_task("many", number * 1e-6), 0.0)
    _run(scheduler, 0.0, Times(0.1))
    scheduler.add(_task("one", 1.0), 1.0)
    while (action := scheduler.next(1.0, Times(0.1))) is not None:
        scheduler.done(1.0)
        if action.kind == "encode":
            break
    assert action is not None
    assert "one" in [task.who for task in action.tasks]


def test_the_earliest_deadline_of_a_key_is_first() -> None:
    scheduler = Scheduler(Policy(pictures=1, capped=False))
    late, early, never = _task(deadline=90.0), _task(deadline=30.0), _task()
    for task in (never, late, early):
        scheduler.add(task, 0.0)
    assert [task for task, _ in scheduler.foreseen(Times())] == [early, late, never]


def test_nothing_joins_a_cycle_if_somebody_would_miss_a_deadline_for_it() -> None:
    scheduler = Scheduler(Policy(wait=100.0, extended=False))
    urgent = _task(deadline=2 * 2.0 + 1.5 * C)
    scheduler.add(urgent, 0.0)
    scheduler.add(_task(), 0.0)
    assert _run(scheduler, 0.0, Times(2.0)).tasks == (urgent,)


@pytest.mark.parametrize(("behind", "joins"), [(2, False), (3, True)])
def test_one_more_group_joins_if_it_saves_more_than_it_delays(behind: int, joins: bool) -> None:
    # n = 4 handed over, k' = 2: 4 * 2 * b < 2S * (2 + m) once m >= 1 with S = 1.5 and e + b = 1.05.
    scheduler, times = Scheduler(Policy(pictures=4)), Times(1.5)
    for _ in range(4):
        scheduler.add(_task(), 0.0)
    assert [_run(scheduler, 0.0, times).kind for _ in range(2)] == ["encode", "base"]
    for number in range(behind):
        scheduler.add(_task(base_key="k" if number < 2 else "other"), 0.0)
    following = _run(scheduler, 0.0, times)
    assert (following.kind, len(following.tasks)) == (("encode", 2) if joins else ("refiner", 4))


def test_the_phase_closes_when_the_oldest_handed_over_waited_half_the_bound() -> None:
    scheduler, times = Scheduler(Policy(wait=100.0, pictures=1)), Times(20.0)
    scheduler.add(_task(), 0.0)
    _run(scheduler, 0.0, times)
    _run(scheduler, 1.0, times)
    scheduler.add(_task(came=51.5), 51.5)
    assert _run(scheduler, 51.5, times).kind == "refiner"


def test_a_short_swap_is_made_at_once() -> None:
    scheduler, times = Scheduler(Policy(pictures=4)), Times(0.2)
    for _ in range(3):
        scheduler.add(_task(), 0.0)
    for _ in range(2):
        _run(scheduler, 0.0, times)
    scheduler.add(_task(), 0.0)
    assert _run(scheduler, 0.0, times).kind == "refiner"


def test_nobody_waits_for_company_while_both_experts_stay_loaded() -> None:
    scheduler = Scheduler(Policy(pictures=4))
    for key in "xyxyx":
        scheduler.add(_task(base_key=key, refiner_key=key), 0.0)
    assert _kinds(scheduler, Times()) == [
        "encode 3", "base 3", "refiner 3", "decode 1", "decode 1", "decode 1",
        "encode 2", "base 2", "refiner 2", "decode 1", "decode 1", "home 0",
    ]  # fmt: skip


def test_work_for_one_expert_rides_in_its_phase() -> None:
    scheduler, times = Scheduler(Policy()), Times(2.0)
    scheduler.add(_task(), 0.0)
    scheduler.add(_task(refiner_key=None), 0.0)
    scheduler.add(_task(base_key=None), 0.0)
    # Base-only work is decoded before the change, since the decoder stays; refiner-only work needs no cycle of its own.
    assert _kinds(scheduler, times) == [
        "encode 3", "base 2", "decode 1", "refiner 2", "decode 1", "decode 1", "home 0",
    ]  # fmt: skip
    assert scheduler.swaps <= 2


def test_a_decoder_that_unloads_a_unet_waits_for_the_end_of_the_cycle() -> None:
    scheduler = Scheduler(Policy())
    scheduler.add(_task(), 0.0)
    scheduler.add(_task(refiner_key=None), 0.0)
    kinds = _kinds(scheduler, Times(2.0, decoder_stays=False))
    assert kinds == ["encode 2", "base 2", "refiner 1", "decode 1", "decode 1", "home 0"]


def test_refiner_work_that_comes_during_the_base_phase_rides_along() -> None:
    scheduler, times = Scheduler(Policy()), Times(2.0)
    scheduler.add(_task(), 0.0)
    for _ in range(2):
        _run(scheduler, 0.0, times)
    rider = _task(base_key=None, cost=replace(COST, base=0.0))
    scheduler.add(rider, 0.0)
    actions = [_run(scheduler, 0.0, times) for _ in range(2)]
    assert actions[0] == Action("encode", (rider,), following="refiner")
    assert actions[1].kind == "refiner"
    assert rider in actions[1].tasks


def test_more_than_a_full_call_is_taken_in_several() -> None:
    scheduler = Scheduler(Policy(pictures=4, capped=False))
    for _ in range(6):
        scheduler.add(_task(), 0.0)
    kinds = _kinds(scheduler, Times(2.0))
    assert kinds[:5] == ["encode 6", "base 4", "base 2", "refiner 4", "refiner 2"]


def test_the_cap_grows_with_the_load() -> None:
    scheduler, times = Scheduler(Policy(pictures=4, memory=60.0)), Times(2.0)
    scheduler.add(_task(), 0.0)
    assert scheduler.cap(0.0, times) == 4
    for second in range(0, 240, 3):
        scheduler.add(_task(came=second), float(second))
    rate = scheduler.load(240.0)
    assert rate == pytest.approx(1 / 3, rel=0.15)
    assert scheduler.cap(240.0, times) >= 2 * (2 * 2.0 * rate / (1 - rate * C)) + 2


@pytest.mark.parametrize("after", range(4))
def test_what_is_dropped_is_gone_and_the_others_are_drawn(after: int) -> None:
    scheduler, times = Scheduler(Policy()), Times(2.0)
    gone, kept = _task(), _task()
    scheduler.add(gone, 0.0)
    scheduler.add(kept, 0.0)
    drawn = [task for _ in range(after) for task in _run(scheduler, 0.0, times).tasks][:0]
    scheduler.drop(gone)
    while (action := scheduler.next(0.0, times)) is not None:
        drawn += action.tasks if action.kind == "decode" else ()
        assert gone not in action.tasks
        scheduler.done(0.0)
    assert drawn == [kept]
    assert not scheduler.busy()


def test_what_failed_in_company_runs_again_without() -> None:
    scheduler, times = Scheduler(Policy()), Times(2.0)
    first, second = _task(), _task()
    for task in (first, second):
        scheduler.add(task, 0.0)
    _run(scheduler, 0.0, times)
    assert scheduler.next(0.0, times) is not None
    scheduler.done(0.0, survivors=())
    for task in (first, second):
        scheduler.again(task)
    kinds = _kinds(scheduler, times)
    assert kinds[:5] == ["encode 2", "base 1", "base 1", "refiner 1", "refiner 1"]


def test_a_graph_runs_when_nothing_else_does() -> None:
    scheduler, times = Scheduler(Policy()), Times(2.0)
    scheduler.add(_task("a"), 0.0)
    scheduler.add(_task("b", alone=True), 0.0)
    scheduler.add(_task("b"), 0.0)
    kinds = _kinds(scheduler, times)
    assert kinds.count("alone 1") == 1
    assert kinds.index("alone 1") > kinds.index("decode 1")
    assert kinds.count("decode 1") == 2


def test_every_task_is_drawn_once_whatever_its_kind() -> None:
    rng, now, tasks = random.Random(9), 0.0, []
    for _ in range(1500):
        now += rng.expovariate(0.9 / C)
        kind = rng.choice(("both", "both", "base", "refiner", "alone"))
        tasks.append(
            _task(
                rng.choice("abcde"),
                now,
                base_key=None if kind in ("refiner", "alone") else rng.choice("xyz"),
                refiner_key=None if kind in ("base", "alone") else rng.choice("xyz"),
                alone=kind == "alone",
                pictures=rng.choice((1, 1, 3)),
                deadline=rng.choice((float("inf"), now + 20.0)),
            )
        )
    for swap in (0.0, 1.0):
        scheduler = Scheduler(Policy(wait=30.0))
        result = sim.simulate(scheduler, tasks, Times(swap, decoder_stays=False))
        assert set(result.latencies) == set(tasks)
        drawn = [task for action in result.actions if action.kind in ("decode", "alone") for task in action.tasks]
        assert len(drawn) == len(tasks)
        for expert in ("base", "refiner"):
            ran = {task for action in result.actions if action.kind == expert for task in action.tasks}
            assert ran == {task for task in tasks if getattr(task, f"{expert}_key") is not None}
        assert all(
            len({getattr(task, f"{action.kind}_key") for task in action.tasks}) == 1
            for action in result.actions
            if action.kind in ("base", "refiner")
        )
