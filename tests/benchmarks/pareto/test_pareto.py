"""Of the settings that draw faster, the frontier, the bars and the page say what was measured."""

import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_trt.benchmarks.model_card import evaluation_cases
from sdxl_trt.benchmarks.pareto.__main__ import bars, figures, main, merged
from sdxl_trt.benchmarks.pareto.drawing import Drawn
from sdxl_trt.benchmarks.pareto.page import Difference, Report, Row, frontier, page, table
from sdxl_trt.benchmarks.pareto.points import FULL, POINTS, chosen
from sdxl_trt.engines import UsageError
from sdxl_trt.mini.score import score_picture

NONE = Difference(0.0, -0.01, 0.01)


def row(ratio: float = 1.0, psnr: float = 99.0, kind: str = "cache 2", **differences: Difference) -> Row:
    effects = dict.fromkeys(("right", "sharpness", "damage"), NONE) | differences
    return Row(kind, 100, 1e12, ratio, 2 * ratio, ratio, ratio, psnr, psnr - 10, 99.0, 0.7, effects)


def report(rows: dict[str, Row], captions: int = 100) -> Report:
    return Report({"processor": "one", "cores": 2}, {"numpy": "2"}, captions, FULL, rows, bars(rows))


@given(st.dictionaries(st.text(min_size=1), st.tuples(st.floats(0.1, 1), st.floats(20, 60)), max_size=12))
def test_nothing_beats_the_frontier_and_the_frontier_beats_all_else(found: dict[str, tuple[float, float]]) -> None:
    rows = {name: row(*place) for name, place in found.items()}
    best = frontier(rows)
    assert [rows[name].psnr for name in best] == sorted({rows[name].psnr for name in best})
    for name, own in rows.items():
        beaten = any(
            rows[one].unet_ratio <= own.unet_ratio and rows[one].psnr >= own.psnr for one in best if one != name
        )
        assert beaten != (name in best)


def test_the_gain_over_fewer_steps_is_at_equal_unet_time() -> None:
    rows = {FULL: row(), "12 steps": row(0.4, 34.0), "15 steps": row(0.5, 38.0), "20 steps, cache 2": row(0.45, 42.3)}
    found = {bar.what: (bar.value, bar.met) for bar in bars(rows)}
    assert found["20 steps, cache 2, against fewer full steps in equal UNet time: PSNR"] == ("6.3 dB", True)
    less = bars(rows | {"20 steps, cache 2": row(0.45, 38.9)})
    assert [bar.met for bar in less] == [False, True, True, False]
    assert {bar.met for bar in bars({FULL: row()})} == {None}


@pytest.mark.parametrize(
    ("right", "sharpness", "met"),
    [
        (Difference(-0.009, -0.011, -0.002), NONE, [True, True]),
        (Difference(-0.02, -0.03, -0.011), Difference(0.003, 0.001, 0.005), [False, False]),
    ],
)
def test_intervals_decide(right: Difference, sharpness: Difference, met: list[bool]) -> None:
    rows = {FULL: row(), "20 steps, cache 2": row(0.45, 42.0, right=right, sharpness=sharpness)}
    assert [bar.met for bar in bars(rows)[1:3]] == met


def test_figures_compare_the_same_captions_and_turns() -> None:
    case = evaluation_cases(1)[0]
    black, grey = np.zeros((128, 128, 3), np.uint8), np.full((128, 128, 3), 16, np.uint8)
    scores = [score_picture(black, case.caption)] * 2
    full = Drawn([black, black], scores, [1.0, 4.0, 9.0], [2.0, 2.0, 2.0], 3e12)
    fast = Drawn([black, grey], scores, [0.5, 1.0, 9.0], [1.0, 0.2, 1.8], 1e12)
    found = figures(POINTS, {FULL: full, "20 steps": fast})
    assert (found["20 steps"].unet_ratio, found["20 steps"].whole_ratio) == (0.5, 0.5)  # medians of 1/2, 1/4, 1
    assert found["20 steps"].worst == pytest.approx(20 * np.log10(255 / 16))
    assert found["20 steps"].differences["right"] == Difference(0.0, 0.0, 0.0)
    assert (found[FULL].psnr, found[FULL].unet_ratio, found["20 steps"].flops) == (99.0, 1.0, 1e12)
    full = Drawn([black, black, grey], scores + scores[:1], [1.0, 4.0, 9.0], [2.0, 2.0, 2.0], 3e12)
    fewer = figures(POINTS, {FULL: full, "10 steps": Drawn([black] * 2, scores, [0.5, 1.0], [1.0, 1.0], 1e12)})
    assert (fewer["10 steps"].captions, fewer["10 steps"].unet_ratio, fewer["10 steps"].psnr) == (2, 0.375, 99.0)


def test_pages_show_every_setting_and_mark_the_frontier() -> None:
    rows = {FULL: row(), "20 steps": row(0.67, 45.0, "fewer steps"), "20 steps, cache 2": row(0.45, 42.0),
            "12 steps": row(0.5, 30.0, "fewer steps", sharpness=Difference(0.1, 0.05, 0.2))}  # fmt: skip
    text, shown = table(report(rows)), page(report(rows))
    for name in rows:
        assert re.search(rf"\| (\*\*)?{re.escape(name)}", text), name
        assert name in shown
    assert "| **20 steps, cache 2** |" in text
    assert "| 12 steps |" in text  # beaten
    assert "+0.1000 (+0.0500 to +0.2000) \\*" in text
    assert shown.count("<figure") == 1
    assert "12 steps: 30.0 dB at 0.50 of the UNet time" in shown


def test_other_rows_of_the_results_are_kept_in_order(tmp_path: Path) -> None:
    path = tmp_path / "pareto.json"
    path.write_bytes(msgspec.json.encode(report({FULL: row(), "12 steps": row(0.4), "15 steps": row(0.5)})))
    new = report({FULL: row(), "20 steps": row(0.7)})
    assert list(merged(new, path).rows) == [FULL, "20 steps", "15 steps", "12 steps"]
    assert merged(new, tmp_path / "none.json") == new
    with pytest.raises(UsageError, match="100 captions"):
        merged(report({FULL: row()}, captions=5), path)


def test_patterns_choose_settings_and_the_full_run() -> None:
    assert list(chosen(["15 steps"])) == [FULL, "15 steps"]
    assert chosen([]) == POINTS
    with pytest.raises(UsageError, match=r"^--only 16 steps: the settings are 30 steps; "):
        chosen(["16 steps"])


@pytest.mark.slow
def test_a_quick_run_draws_with_every_kind_of_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "quick.json"
    options = ["--quick", "--results", str(results), "--work", str(tmp_path), "--only", "10 steps"]
    assert main([*options, "--only", "15 steps, cache 3"]) == 0
    found = msgspec.json.decode(results.read_bytes(), type=Report)
    assert list(found.rows) == [FULL, "10 steps", "15 steps, cache 3"]
    full, few, cached = found.rows.values()
    assert few.flops == pytest.approx(full.flops / 3, rel=0.01)
    assert cached.flops < 0.75 * full.flops / 2
    assert full.psnr == 99.0 > cached.psnr > 20.0
    assert results.with_suffix(".html").exists()
    assert "frontier, the fastest first" in capsys.readouterr().out
