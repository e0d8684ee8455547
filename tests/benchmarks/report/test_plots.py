"""The charts' arithmetic: lengths are in proportion, ticks are round and hold the data, labels do not touch."""

import math
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_trt.benchmarks.report.plots import Dots, Item, Line, Stack, bar_chart, dot_chart, line_chart, stacked_chart
from sdxl_trt.benchmarks.report.svg import Scale, element, nice_ticks, shortened

finite = st.floats(-1e9, 1e9, allow_subnormal=False)


@given(finite, finite)
def test_ticks_are_few_round_and_hold_both_ends(one: float, other: float) -> None:
    low, high = sorted((one, other))
    ticks = nice_ticks(low, high)
    slack = 1e-6 * max(high - low, abs(high) * 1e-3, 1e-300)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 7
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(
    ("high", "ticks"),
    [(1.0, [0, 0.25, 0.5, 0.75, 1.0]), (11, [0, 5, 10, 15]), (0.0, [0, 1]), (412, [0, 200, 400, 600])],
)
def test_ticks_from_zero(high: float, ticks: list[float]) -> None:
    assert nice_ticks(0.0, high) == pytest.approx(ticks)


def test_bars_are_as_long_as_their_values() -> None:
    tree = ET.fromstring(bar_chart("t", [Item("a", 2.0, "2"), Item("b", 6.0, "6", own=True)], "s"))
    widths = [float(each.get("width", "0")) for each in tree.iter("rect")]
    assert widths[1] == pytest.approx(3 * widths[0], abs=0.02)
    assert [each.get("class") for each in tree.iter("rect")] == ["bar rest", "bar own"]


def test_parts_stand_end_to_end_in_one_colour_a_name() -> None:
    stacks = [Stack("a", {"x": 1.0, "y": 2.0}, "3"), Stack("b", {"y": 4.0}, "4")]
    bars = list(ET.fromstring(stacked_chart("t", stacks, "s")).iter("rect"))[2:]
    starts, widths = ([float(each.get(key, "0")) for each in bars] for key in ("x", "width"))
    assert starts[1] == pytest.approx(starts[0] + widths[0], abs=0.02)
    assert starts[2] == starts[0]
    assert widths[2] == pytest.approx(2 * widths[1], abs=0.02)
    assert [each.get("class") for each in bars] == ["bar s0", "bar s1", "bar s1"]


def test_more_names_than_colours_share_the_last_one() -> None:
    chart = stacked_chart("t", [Stack("a", {f"part {number}": 1.0 for number in range(11)}, "11")], "s")
    assert 'class="bar s8"' in chart
    assert "s9" not in chart


def test_points_lie_where_their_values_are() -> None:
    chart = line_chart("t", [Line("a", ((1.0, 10.0, 0.0), (2.0, 20.0, 0.1), (4.0, 40.0, 0.0)), 3)], ("x", "s"))
    circles = list(ET.fromstring(chart).iter("circle"))
    x, y = ([float(each.get(key, "0")) for each in circles] for key in ("cx", "cy"))
    assert x[2] - x[1] == pytest.approx(2 * (x[1] - x[0]), abs=0.05)
    assert y[1] - y[2] == pytest.approx(2 * (y[0] - y[1]), abs=0.05)
    assert 'class="s3"' in chart


def test_names_of_places_that_are_close_do_not_touch() -> None:
    places = {0.1: "a long name", 0.11: "another one", 4.0: "far away"}
    chart = line_chart("t", [Line("a", tuple((at, 1.0, 0.0) for at in places), 0)], ("x", "s"), places)
    assert ["a long name" in chart, "another one" in chart, "far away" in chart] == [True, False, True]


def test_a_dot_that_is_equal_lies_beyond_the_axis_and_a_shared_limit_is_said_once() -> None:
    rows = [Dots("a", {"x": None, "y": 60.0}), Dots("b", {"x": 30.0, "y": 50.0})]
    chart = dot_chart("t", rows, "dB", {"x": 40.0, "y": 40.0})
    x = [float(each.get("cx", "0")) for each in ET.fromstring(chart).iter("circle")]
    assert x[0] > max(x[1:])
    assert x[1] > x[3] > x[2]
    assert chart.count(">asked: 40 dB<") == 4  # in the legend with its title, and a tick a row
    assert "asked mark" in chart


def test_what_is_given_to_an_element_is_escaped() -> None:
    tree = ET.fromstring(element("a", "b", title="\"'<&>\0", data_x=1.0))
    assert tree.attrib == {"title": "\"'<&>\ufffd", "data-x": "1"}


def test_a_long_label_is_cut() -> None:
    assert shortened("a" * 100, 60, 12) == "a" * 7 + "…"
    assert shortened("short", 60, 12) == "short"


def test_a_scale_ends_where_it_ends() -> None:
    scale = Scale(0.0, 10.0, 100.0, 200.0)
    assert [scale(-5), scale(5), scale(1e300)] == [100.0, 150.0, 200.0]
    assert math.isfinite(Scale(1.0, 1.0, 0.0, 1.0)(5.0))
