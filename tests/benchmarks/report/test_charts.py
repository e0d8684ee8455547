"""The charts show their data: lengths are in proportion, points and limits lie where their values are."""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import matplotlib as mpl
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.benchmarks import cli
from sdxl_trt.benchmarks.report.charts import charts
from sdxl_trt.benchmarks.report.figures import coloured
from sdxl_trt.benchmarks.report.pages import write_pages
from sdxl_trt.benchmarks.report.records import BenchReport, Measurement, Quality
from sdxl_trt.benchmarks.report.style import LIGHT
from sdxl_trt.engines.errors import SdxlTrtError

Point = tuple[float, float]


@pytest.fixture(scope="module")
def drawn(report: BenchReport) -> dict[str, list[str]]:
    return charts(report)


def _chart(found: BenchReport | dict[str, list[str]], section: str, number: int = 0) -> ET.Element:
    return ET.fromstring((charts(found) if isinstance(found, BenchReport) else found)[section][number])


def _points(path: ET.Element) -> list[Point]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d", ""))]


def _marks(chart: ET.Element) -> Iterator[tuple[str, ET.Element]]:
    """Yield what is said of a mark, with its path."""
    for group in chart.iter("g"):
        said, path = group.find("title"), group.find("path")
        if said is not None and path is not None:
            yield said.text or "", path


def _mark(chart: ET.Element, said: str) -> list[Point]:
    found = [path for title, path in _marks(chart) if title.startswith(said)]
    assert len(found) == 1, (said, [title for title, _ in _marks(chart)])
    return _points(found[0])


def _left_and_right(points: list[Point]) -> Point:
    return min(x for x, _ in points), max(x for x, _ in points)


def _texts(chart: ET.Element) -> dict[str, Point]:
    """Return the texts of the SVG with their places."""
    return {text.text or "": (float(text.get("x", "")), float(text.get("y", ""))) for text in chart.iter("text")}


def _legend(chart: ET.Element) -> dict[str, str]:
    return {chip.text or "": chip.get("style", "") for chip in chart.iter("span")}


def _colour(path: ET.Element) -> str:
    return re.findall(r"(?:fill|stroke): (var\(--\w+\))", path.get("style", ""))[0]


def _only(report: BenchReport, *measurements: Measurement) -> BenchReport:
    return msgspec.structs.replace(report, measurements=measurements, floors={}, cold_starts=(), quality=())


def _timed(contestant: str, seconds: float, **more: object) -> Measurement:
    fields = {"what": "odd", "width": 8, "height": 8, "batch": 1, "seconds": (seconds,)} | more
    return msgspec.convert({"contestant": contestant} | fields, Measurement)


def test_bars_are_as_long_as_their_values_and_ours_stands_out(drawn: dict[str, list[str]]) -> None:
    chart = _chart(drawn, "parts")
    bars = [path for said, path in _marks(chart) if re.search(r": [\d.]+ ms ±1.0 %$", said)]
    (start, ours), (other_start, theirs) = (_left_and_right(_points(bar)) for bar in bars)
    assert start == other_start
    assert (theirs - start) / (ours - start) == pytest.approx(1.027 / 0.513, rel=1e-4)
    assert [_colour(bar) for bar in bars] == ["var(--own)", "var(--rest)"]


def test_a_length_is_what_its_axis_says(drawn: dict[str, list[str]]) -> None:
    chart = _chart(drawn, "parts")
    places = _texts(chart)
    step = (places["100 ms"][0] - places["0 ms"][0]) / 100
    start, end = _left_and_right(_mark(chart, "PyTorch eager, fp32: 103 ms"))
    assert (end - start) / step == pytest.approx(102.7, rel=1e-4)
    assert {"sdxl-trt, fp32", "51.3 ms ±1.0 %", "PyTorch eager, fp32", "103 ms ±1.0 %"} <= places.keys()


def test_the_spread_is_drawn_around_the_end_of_a_bar(report: BenchReport, drawn: dict[str, list[str]]) -> None:
    chart = _chart(drawn, "cold")
    start, end = _left_and_right(_mark(chart, "trt-generate: 2.34 s"))
    whiskers = [_points(path) for path in chart.iter("path") if len(_points(path)) == 6]
    assert len(whiskers) == 2
    low, high = _left_and_right(whiskers[0])
    spread = report.cold_starts[0].spread
    assert (high - end, end - low) == pytest.approx(((end - start) * spread,) * 2, rel=1e-3)


def test_a_floor_is_a_tick_on_every_bar_and_in_the_legend(drawn: dict[str, list[str]]) -> None:
    chart = _chart(drawn, "parts")
    start, end = _left_and_right(_mark(chart, "sdxl-trt, fp32: 51.3 ms"))
    ticks = [_points(path) for said, path in _marks(chart) if said == "floor: 30.1 ms"]
    assert len(ticks) == 2
    shares = [(x - start) / (end - start) for tick in ticks for x, _ in tick]
    assert shares == pytest.approx([30.1 / 51.3] * 4, rel=1e-4)
    assert _legend(chart) == {"floor: 30.1 ms": "--chip: var(--text)"}


def test_stages_stand_end_to_end_in_the_colours_of_the_legend(drawn: dict[str, list[str]]) -> None:
    chart = _chart(drawn, "pictures")
    legend = _legend(chart)
    assert list(legend) == ["text encoders", "base UNet", "handoff", "refiner UNet", "VAE decode"]
    for contestant, whole in (("sdxl-trt", "0.513 s"), ("PyTorch eager", "1.03 s")):
        end = 0.0
        for stage, colour in legend.items():
            said = f"{contestant}, fp32, {stage}: "
            left, right = _left_and_right(_mark(chart, said))
            assert left == pytest.approx(end or left, abs=0.01)
            end = right
            path = next(path for title, path in _marks(chart) if title.startswith(said))
            assert colour == f"--chip: {_colour(path)}"
        assert whole in _texts(chart)
    base, decode = (_left_and_right(_mark(chart, f"sdxl-trt, fp32, {stage}")) for stage in ("base UNet", "VAE decode"))
    assert (base[1] - base[0]) / (decode[1] - decode[0]) == pytest.approx(0.7 / 0.08, rel=1e-3)


def test_more_kinds_than_colours_share_the_last_one() -> None:
    colours = list(coloured(f"stage {number}" for number in range(11)).values())
    assert len(set(colours)) == 9
    assert colours[8:] == [LIGHT["c8"]] * 3


@pytest.mark.parametrize(
    ("number", "names", "share", "ticks"),
    [
        (1, ("1 pictures at once", "2 pictures at once"), 1 / 2, {"1", "2"}),
        (2, ("32×32 pixels", "64×64 pixels"), 1 / 4, {"32×32", "64×64"}),
        (3, ("0.25 share of the base", "1 share of the base"), 1 / 4, {"0", "0.2", "0.4", "0.6", "0.8", "1"}),
    ],
    ids=["batch", "size", "handoff"],
)
def test_points_lie_where_their_values_are(
    report: BenchReport, drawn: dict[str, list[str]], number: int, names: tuple[str, str], share: float, ticks: set[str]
) -> None:
    chart = _chart(drawn, "pictures", number)
    places = _texts(chart)
    assert ticks <= places.keys()
    grid = [_points(path) for path in chart.iter("path") if _colour(path) == "var(--rule)"]
    left, bottom = min(x for line in grid for x, _ in line), max(y for line in grid for _, y in line)
    sweep = ("batch", "size", "handoff")[number - 1]
    timed = [one for one in report.measurements if one.sweep == sweep]
    for label, contestant in (("sdxl-trt, fp32", "sdxl-trt"), ("PyTorch eager, fp32", "eager")):
        dots = [
            _points(path)[0] for said, path in _marks(chart)
            if said.startswith(f"{label}: ") and any(f"at {name}" in said for name in names)
        ]  # fmt: skip
        medians = [one.median for one in timed if one.contestant == contestant]
        assert dots in [_points(path) for path in chart.iter("path")]
        assert (dots[0][0] - left) / (dots[1][0] - left) == pytest.approx(share, abs=1e-3)
        assert (bottom - dots[0][1]) / (bottom - dots[1][1]) == pytest.approx(medians[0] / medians[1], rel=1e-3)
    assert _legend(chart) == {"sdxl-trt, fp32": "--chip: var(--c0)", "PyTorch eager, fp32": "--chip: var(--c1)"}


def test_a_line_alone_has_its_figures_beside_its_points(report: BenchReport, drawn: dict[str, list[str]]) -> None:
    ours = _only(report, *(one for one in report.measurements if one.contestant == "sdxl-trt"))
    assert {"523", "975"} <= _texts(_chart(ours, "pictures", 1)).keys()
    assert "523" not in _texts(_chart(drawn, "pictures", 1))


def test_the_batch_that_all_were_compared_at_is_a_point_of_the_sweep_by_batch(report: BenchReport) -> None:
    usual, *swept = (one for one in report.measurements if one.what == "picture" and one.sweep in {"", "batch"})
    swept = [one for one in swept if one.contestant == usual.contestant]
    chart = _chart(_only(report, msgspec.structs.replace(usual, batch=4), *swept), "pictures", 1)
    assert {"1", "2", "4"} <= _texts(chart).keys()
    assert _mark(chart, "sdxl-trt, fp32: 513 ms at 4 pictures at once")


def test_the_spread_of_a_point_is_a_line_through_it(drawn: dict[str, list[str]]) -> None:
    chart = _chart(drawn, "pictures", 1)
    x, y = _mark(chart, "PyTorch eager, fp32: 1.95 s")[0]
    through = [_points(path) for path in chart.iter("path") if {at for at, _ in _points(path)} == {x}]
    (_, low), (_, high) = max(through, key=lambda line: abs(line[0][1] - line[1][1]))
    assert low - y == pytest.approx(y - high, abs=0.01)
    assert low > high


def test_quality_has_a_dot_a_stage_and_a_tick_at_what_was_asked(drawn: dict[str, list[str]]) -> None:
    chart = _chart(drawn, "quality")
    places = _texts(chart)
    step = (places["80 dB"][0] - places["60 dB"][0]) / 20
    zero = places["60 dB"][0] - 60 * step
    dots = {said: (_points(path)[0][0] - zero) / step for said, path in _marks(chart)}
    equal = dots.pop("fp32, embeddings: equal")
    assert dots == pytest.approx(
        {
            "fp32, embeddings, asked: 60 dB": 60,
            "fp32, pixels, asked: 60 dB": 60,
            "fp32, pixels: 81.3 dB": 81.3,
            "broken, embeddings, asked: 60 dB": 60,
            "broken, embeddings: 17.2 dB": 17.2,
        },
        rel=1e-3,
    )
    assert equal > max(float(text.removesuffix(" dB")) for text in places if text.endswith(" dB"))
    assert {"equal", "fp32", "broken"} <= places.keys()
    kinds = {"embeddings": "--chip: var(--c0)", "pixels": "--chip: var(--c1)"}
    assert _legend(chart) == kinds | {"tick: asked": "--chip: var(--text)"}


def test_dots_of_two_stages_never_cover_each_other(report: BenchReport) -> None:
    same = tuple(Quality(variant="a", stage=stage, psnr=50.0) for stage in ("x", "y", "z"))
    heights = [
        _points(path)[0][1]
        for _, path in _marks(_chart(msgspec.structs.replace(report, quality=same), "quality"))
    ]  # fmt: skip
    assert all(below - above > 8 for above, below in itertools.pairwise(heights))


@settings(max_examples=15, deadline=None)
@given(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9))
def test_the_axis_holds_every_bar_and_its_ticks_are_few_and_round(
    report: BenchReport, one: float, other: float
) -> None:
    chart = _chart(_only(report, _timed("sdxl-trt", one), _timed("eager", other)), "parts")
    grid = sorted({_points(path)[0][0] for path in chart.iter("path") if _colour(path) == "var(--rule)"})
    assert 2 <= len(grid) <= 7
    bars = [_left_and_right(_points(path)) for _, path in _marks(chart)]
    assert all(left == grid[0] and right <= grid[-1] + 0.01 for left, right in bars)
    assert max(right for _, right in bars) > grid[-2] - 0.01


def test_a_long_label_is_cut_and_its_title_is_whole(report: BenchReport) -> None:
    chart = _chart(_only(report, _timed("n" * 200, 1.0)), "parts")
    assert [text for text in _texts(chart) if "n" in text] == ["n" * 47 + "…"]
    assert "n" * 200 in [title.text for title in chart.iter("title")]


def test_a_chart_can_stand_in_a_page_with_others(drawn: dict[str, list[str]]) -> None:
    for chart in (chart for section in drawn.values() for chart in section):
        assert not [each.tag for each in ET.fromstring(chart).iter() if "id" in each.attrib]
        assert not re.findall(r"<(?:use|defs|style|metadata)|url\(|font-family|DejaVu", chart)
        assert not re.findall(r'style="[^"]*#', chart)


def test_a_user_s_own_style_has_no_say_and_is_left_alone(report: BenchReport, drawn: dict[str, list[str]]) -> None:
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": False, "grid.linestyle": ":"}):
        assert charts(report) == drawn
        assert mpl.rcParams["font.size"] == 30


@pytest.fixture
def _without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.usefixtures("_without_matplotlib")
def test_without_matplotlib_the_figures_are_written_all_the_same(report: BenchReport, tmp_path: Path) -> None:
    with pytest.raises(SdxlTrtError, match=re.escape("pip install 'sdxl-trt[bench]'")):
        write_pages(report, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md"}


@pytest.mark.usefixtures("_without_matplotlib")
def test_without_matplotlib_nothing_is_measured_for_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdxl_trt.benchmarks.measure.find_subject", lambda *_: pytest.fail("it began to measure"))
    assert cli.main(["--quick", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == ["error: the charts of a page need matplotlib, which is missing; pip install 'sdxl-trt[bench]'"]


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "MPL"))}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables | environment)


@pytest.mark.parametrize("option", ["--help", "--estimate=h100"])
def test_what_draws_nothing_imports_no_matplotlib(option: str) -> None:
    code = f"""
import sys
sys.modules["matplotlib"] = None
from sdxl_trt.benchmarks import cli, report
sys.exit(cli.main([{option!r}]))"""
    assert _python(code).returncode == 0


def test_a_page_needs_no_home_to_write_to() -> None:
    code = """
import tempfile, pathlib
from sdxl_trt.benchmarks.report.figures import axes_of, drawn, styled
with styled():
    print(drawn("a", {}, axes_of(50, left=0, right=0, bottom=0, top=0))[:8])
"""
    done = _python(code, HOME="/proc/nowhere")
    assert (done.stdout, done.stderr) == ("<figure>\n", "")
