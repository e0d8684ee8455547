"""Which steps are full, and what the others are given: on engines whose deep features are known functions of sigma."""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.engines import DeviceArray
from sdxl_trt.runtime.diffusion import CachePolicy, StepCache

POLICIES = st.builds(CachePolicy, every=st.integers(1, 6), first=st.integers(1, 4))


@settings(max_examples=40)
@given(POLICIES, st.integers(0, 60))
def test_the_first_steps_are_full_and_then_every_nth(policy: CachePolicy, steps: int) -> None:
    kinds = [policy.full(step) for step in range(steps)]
    assert all(kinds[: policy.first])
    rest = kinds[policy.first :]
    assert [place for place, full in enumerate(rest, start=1) if full] == [*range(policy.every, len(rest) + 1,
                                                                                  policy.every)]  # fmt: skip
    assert policy.full_steps(steps) == sum(kinds)
    assert CachePolicy(1, policy.first).full_steps(steps) == steps


@settings(max_examples=40)
@given(POLICIES, st.integers(0, 60), st.integers(0, 60))
def test_where_a_stage_ends_does_not_change_its_steps(policy: CachePolicy, steps: int, longer: int) -> None:
    """Requests that differ in their handoff alone share a base run."""
    assert policy.full_steps(steps) + sum(policy.full(steps + more) for more in range(longer)) == (
        policy.full_steps(steps + longer)
    )


class Full:
    """Answers with its deep feature, which is `feature` of the sigma that the sample holds; two buffers in turn."""

    def __init__(self, feature: Callable[[float], float]) -> None:
        self.feature = feature
        self.buffers = [np.empty(0), np.empty(0)]
        self.kept = self.calls = 0
        self.bound: dict[str, Any] = {}

    def bind(self, constants: Mapping[str, Any]) -> None:
        self.bound = dict(constants)

    def _deep(self, inputs: Mapping[str, Any]) -> np.ndarray:
        self.calls += 1
        return np.array([[self.feature(float(value))] for value in inputs["sample"]])

    def infer(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        assert outputs == ["out_sample"]
        return {"out_sample": self._deep(inputs)}

    def infer_keeping(
        self, inputs: Mapping[str, Any], kept: Collection[str], outputs: Sequence[str]
    ) -> tuple[dict[str, Any], dict[str, DeviceArray]]:
        assert ([*kept], [*outputs]) == (["deep_feature"], ["out_sample"])
        deep = self._deep(inputs)
        buffer = self.buffers[self.kept % 2]
        if buffer.shape != deep.shape:
            buffer = self.buffers[self.kept % 2] = np.empty_like(deep)
        buffer[:] = deep
        self.kept += 1
        return {"out_sample": deep}, {"deep_feature": DeviceArray(deep.shape, deep.dtype, buffer, "here")}


class Shallow:
    """Answers with the deep feature that it is given."""

    component = SimpleNamespace(
        inputs=[SimpleNamespace(name=name) for name in ("sample", "text", "deep_new", "deep_old", "deep_factor")]
    )

    def __init__(self) -> None:
        self.factors: list[float] = []
        self.bound: dict[str, Any] = {}

    def bind(self, constants: Mapping[str, Any]) -> None:
        self.bound = dict(constants)

    def infer(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        assert outputs == ["out_sample"]
        assert inputs.keys() == {"sample", "deep_new", "deep_old", "deep_factor"}
        new, old, factor = inputs["deep_new"], inputs["deep_old"], inputs["deep_factor"]
        assert factor.dtype == np.float32
        assert factor.shape == (len(inputs["sample"]),)
        self.factors.append(float(factor[0]))
        return {"out_sample": new.handle + (new.handle - old.handle) * factor[:, None]}


def _run(
    calls: Sequence[Sequence[tuple[float, int]]], feature: Callable[[float], float], policy: CachePolicy
) -> tuple[list[list[tuple[float, bool]]], int, Shallow]:
    """Return the answer of every call of every step, each (sigma, rows), and whether the full UNet gave it."""
    full, shallow = Full(feature), Shallow()
    cache = StepCache(full, shallow, policy, lambda sigma: sigma)  # type: ignore[arg-type]
    answers, count = [], 0
    for step in calls:
        answers.append([])
        for sigma, rows in step:
            before = full.calls
            sample = {"sample": np.full(rows, sigma), "timestep": np.zeros(rows)}
            answer = cache.infer(sample, sigma, rows)
            assert answer.shape == (rows, 1)
            answers[-1].append((float(answer[0, 0]), full.calls > before))
        count = cache.end_step()
    return answers, count, shallow


SIGMAS = st.lists(st.integers(1, 1000), min_size=5, max_size=20, unique=True).map(
    lambda sigmas: sorted((float(sigma) for sigma in sigmas), reverse=True)
)


@settings(max_examples=40)
@given(SIGMAS, POLICIES, st.floats(-2, 2), st.booleans())
def test_features_on_a_line_are_met_exactly(
    sigmas: list[float], policy: CachePolicy, slope: float, twice: bool
) -> None:
    """With one call a step, and with two: at a step's sigma, and at its end, where the next step begins."""
    calls = [[(sigma, 2), *([(after, 2)] if twice else [])] for sigma, after in itertools.pairwise(sigmas)]
    answers, count, _ = _run(calls, lambda sigma: 3.0 + slope * sigma, policy)
    enough = policy.first > 1 or twice  # one feature is used as it is
    for step, (asked, answered) in enumerate(zip(calls, answers, strict=True)):
        for (sigma, _), (answer, full) in zip(asked, answered, strict=True):
            assert full == policy.full(step)
            if full or enough:
                assert answer == pytest.approx(3.0 + slope * sigma, abs=1e-2)
    assert count == policy.full_steps(len(calls))


def test_two_calls_at_one_sigma_do_not_divide_by_zero() -> None:
    """Heun ends a step where the next begins: both features are at one sigma, and no line goes through them."""
    calls = [[(9.0, 1), (7.0, 1)], [(7.0, 1), (7.0, 1)], [(5.0, 1), (4.0, 1)]]
    answers, _, shallow = _run(calls, lambda sigma: sigma**2, CachePolicy(4, 2))
    assert shallow.factors == [1.0, 1.5]
    assert answers[2] == [(49.0 + (49 - 81) * 1.0, False), (49.0 + (49 - 81) * 1.5, False)]


def test_other_rows_drop_the_features_and_make_the_step_full() -> None:
    """Guidance ends: the features of both sides are of no use, and later ones lie on no line with them."""
    rows = [2, 2, 2, 1, 1, 1, 1, 1]
    calls = [[(8.0 - step, count)] for step, count in enumerate(rows)]
    answers, count, shallow = _run(calls, lambda sigma: sigma**2, CachePolicy(3, 2))
    kinds = [full for ((_, full),) in answers]
    assert kinds == [True, True, False, True, True, False, False, True]
    assert shallow.factors == [1.0, 1.0, 2.0]
    assert answers[5] == [(16.0 + (16 - 25), False)]
    assert count == 5


def test_one_feature_is_used_as_it_is() -> None:
    calls = [[(8.0, 2)], [(7.0, 2)], [(6.0, 1)], [(5.0, 1)], [(4.0, 1)]]
    answers, _, shallow = _run(calls, lambda sigma: sigma**2, CachePolicy(9, 2))
    assert [full for ((_, full),) in answers] == [True, True, True, False, False]
    assert shallow.factors == [0.0, 0.0]
    assert answers[3:] == [[(36.0, False)], [(36.0, False)]]


def test_rows_that_change_within_a_step_make_the_rest_of_it_full() -> None:
    calls = [[(9.0, 2), (8.0, 2)], [(8.0, 2), (7.0, 1), (7.0, 1)], [(6.0, 1), (5.0, 1)]]
    answers, count, _ = _run(calls, lambda sigma: sigma, CachePolicy(9, 1))
    assert [[full for _, full in step] for step in answers] == [[True, True], [False, True, True], [False, False]]
    assert count == 2


def test_each_engine_is_bound_to_what_it_takes() -> None:
    full, shallow = Full(float), Shallow()
    cache = StepCache(full, shallow, CachePolicy(2, 1), float)  # type: ignore[arg-type]
    cache.bind({"text": 1, "hidden": 2})  # type: ignore[dict-item]
    assert (full.bound, shallow.bound) == ({"text": 1, "hidden": 2}, {"text": 1})
