"""Which devices draw what, and the options of every deployment."""

import pytest

from sdxl_trt.engines import UsageError
from sdxl_trt.server.desk.plan import Cost, Task, Times
from sdxl_trt.server.options import Options
from sdxl_trt.server.ray.dispatch import Dispatch
from sdxl_trt.server.ray.layout import ASSUMED, Layout, Seconds, choose_layout, parse_seconds
from sdxl_trt.server.ray.options import Deployed, ingress_options, pool_options


def test_two_devices_hold_both_experts_unless_a_change_is_dear() -> None:
    """Split wins if 2·max(b, r + d) < c + 2S/k: in the example, if S/k is above 0.3 s."""
    assert not choose_layout("auto", 2, ASSUMED, 4).split
    limit = (2 * ASSUMED.base - ASSUMED.picture) / 2
    assert limit == pytest.approx(0.305)
    for swap, split in ((4 * limit * 0.99, False), (4 * limit * 1.01, True)):
        found = choose_layout("auto", 2, Seconds(1.04, 0.32, 0.1, swap), 4)
        assert found.split is split
        assert (found.base, found.refiner, found.together) == ((1, 1, 0) if split else (0, 0, 2))


@pytest.mark.parametrize(("devices", "base", "refiner"), [(2, 1, 1), (3, 2, 1), (7, 5, 2), (14, 10, 4)])
def test_a_split_shares_devices_as_the_experts_take_seconds(devices: int, base: int, refiner: int) -> None:
    found = choose_layout("split", devices, ASSUMED, 4)
    assert (found.base, found.refiner) == (base, refiner)
    assert found.rate == pytest.approx(min(base / 1.04, refiner / 0.42))


def test_the_choice_is_the_faster_of_the_two_formulas() -> None:
    for devices in range(2, 12):
        for pictures in (1, 4, 16):
            seconds = Seconds(1.04, 0.32, 0.1, 2.0)
            together = devices * pictures / (2 * 2.0 + seconds.picture * pictures)
            split = max(min(base / 1.04, (devices - base) / 0.42) for base in range(1, devices))
            found = choose_layout("auto", devices, seconds, pictures)
            assert (found.split, found.rate) == (split > together, pytest.approx(max(split, together)))


def test_the_choice_is_said_in_one_line() -> None:
    line = choose_layout("auto", 2, ASSUMED, 4, assumed=True).line()
    assert line == ("ray: 2 devices: 2 with both experts; 1.27 pictures/s together, 0.962 split by assumed seconds;"
                    " --ray-seconds states measured ones")  # fmt: skip
    assert choose_layout("split", 3, ASSUMED, 4).line().startswith("ray: 3 devices: 2 base + 1 refiner; asked for; ")


def test_a_split_needs_two_devices_and_a_refiner() -> None:
    with pytest.raises(UsageError, match="1 device is too few; use --ray-layout together"):
        choose_layout("split", 1, ASSUMED, 4)
    with pytest.raises(UsageError, match="the bundle has no refiner"):
        choose_layout("split", 4, ASSUMED, 4, refined=False)
    assert choose_layout("auto", 4, ASSUMED, 4, refined=False).together == 4


def test_seconds_are_four_numbers() -> None:
    assert parse_seconds("2,0.5,0.25,1") == Seconds(2.0, 0.5, 0.25, 1.0)
    for text in ("", "1,2,3", "0,1,1,1", "1,-1,1,1", "1,1,1,nan", "a,b,c,d", "1,1,1,1,1"):
        with pytest.raises(UsageError, match="BASE,REFINER,DECODE,SWAP"):
            parse_seconds(text)


def test_no_deployment_has_an_option_of_rays_own_choice() -> None:
    deployed = Deployed(Options(grace=60.0), gpus=True, batch=4)
    assert pool_options(deployed, 3) == {
        "ray_actor_options": {"num_cpus": 1, "num_gpus": 1},
        "max_ongoing_requests": 8,
        "max_queued_requests": 8,
        "autoscaling_config": {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 4,
                               "upscale_delay_s": 30.0, "downscale_delay_s": 600.0},
        "health_check_period_s": 10.0,
        "health_check_timeout_s": 30.0,
        "graceful_shutdown_timeout_s": 70.0,
        "graceful_shutdown_wait_loop_s": 2.0,
        "backpressure_config": {"status_code": 429, "retry_after_s": 5},
    }  # fmt: skip
    found = ingress_options(deployed)
    assert (found["num_replicas"], found["max_ongoing_requests"], found["max_queued_requests"]) == (1, 512, 64)
    assert found["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 0}


def _task(who: str, base: float = 2.0, refiner: float = 1.0, decode: float = 0.5) -> Task:
    return Task(who, Cost(0.0, base, refiner, decode), 0.0, object(), object())


def test_the_slower_pool_decides_when_everything_is_drawn() -> None:
    dispatch = Dispatch(Layout(2, 1, 0, 1.0, ""))
    for _ in range(4):
        dispatch.add(_task("a"), 0.0)
    assert dispatch.drain(Times()) == pytest.approx(max(4 * 2.0 / 2, 4 * 1.5))
    first = dispatch.take(lambda task: True)
    assert first is not None
    dispatch.move(first, "handed_over")
    assert dispatch.counts() == {"waiting": 3, "base": 0, "handed_over": 1, "refiner": 0}
    assert dispatch.drain(Times()) == pytest.approx(4 * 1.5)
    together = Dispatch(Layout(0, 0, 2, 1.0, ""))
    for _ in range(4):
        together.add(_task("a"), 0.0)
    assert together.drain(Times()) == pytest.approx(4 * 3.5 / 2)


def test_owners_take_turns_however_many_one_of_them_has() -> None:
    dispatch = Dispatch(Layout(0, 0, 2, 1.0, ""))
    for who in "aaaab":
        dispatch.add(_task(who), 0.0)
    taken = [dispatch.take(lambda task: True) for _ in range(3)]
    assert sorted(task.who for task in taken if task is not None) == ["a", "a", "b"]
