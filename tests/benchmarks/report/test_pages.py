"""A report as a page: well-formed, self-contained, with every figure, and safe whatever its names are."""

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.benchmarks.measure.bars import Bar
from sdxl_trt.benchmarks.report.charts import charts
from sdxl_trt.benchmarks.report.markdown import markdown_report
from sdxl_trt.benchmarks.report.pages import element, page, write_pages
from sdxl_trt.benchmarks.report.quantities import plain
from sdxl_trt.benchmarks.report.records import (
    BenchReport,
    BenchSettings,
    ColdStart,
    Contestant,
    Measurement,
    Quality,
    read_report,
)

VOID = {"meta"}


def _parsed(report: BenchReport) -> ET.Element:
    """Return the page, which must be XML too, as a tree."""
    return ET.fromstring(page(report).removeprefix("<!DOCTYPE html>"))


def _texts(tree: ET.Element) -> str:
    return "\n".join(text for text in tree.itertext())


def test_it_is_well_formed_and_needs_nothing_from_elsewhere(report: BenchReport) -> None:
    tree = _parsed(report)
    assert not [each.tag for each in tree.iter() if each.tag in {"script", "link", "img", "iframe", "object", "image"}]
    links = [value for each in tree.iter() for key, value in each.items() if key in {"href", "src", "xlink:href"}]
    assert links
    assert all(link.startswith("#") for link in links)
    assert {link[1:] for link in links} == {each.get("id") for each in tree.iter("section")}
    style = tree.findtext("head/style") or ""
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style


def test_no_element_is_closed_as_html_cannot(report: BenchReport) -> None:
    """A browser reads ``<p/>`` as a ``<p>`` that stays open; inside an <svg> it does not."""
    body = re.sub(r"<svg.*?</svg>", "", page(report), flags=re.DOTALL)
    assert set(re.findall(r"<(\w+)[^>]*/>", body)) <= VOID


def test_what_is_given_to_an_element_is_escaped() -> None:
    assert ET.fromstring(element("a", "b", title="\"'<&>\0", data_x="1")).attrib == {
        "title": "\"'<&>\ufffd",
        "data-x": "1",
    }


def test_every_text_of_the_markdown_is_in_it(report: BenchReport) -> None:
    """Both are made of the same sections: what a row of the table says, a row of the page says."""
    rows = [
        [cell.strip(" *") for cell in line.split("|")[1:-1]]
        for line in markdown_report(report).splitlines()
        if "|" in line
    ]
    found = [["".join(cell.itertext()).strip() for cell in row] for row in _parsed(report).iter("tr")]
    told = [row for row in rows if not set("".join(row)) <= set("-: ")]
    assert [re.sub(r"\\(.)", r"\1", "|".join(row)) for row in told] == ["|".join(row) for row in found]


def test_every_chart_has_a_name_and_every_measurement_is_drawn(report: BenchReport) -> None:
    drawn = charts(report)
    assert {key: len(found) for key, found in drawn.items()} == {"pictures": 4, "parts": 1, "cold": 1, "quality": 1}
    for chart in (chart for found in drawn.values() for chart in found):
        figure, svg = ET.fromstring(chart), ET.fromstring(chart).find("svg")
        assert svg is not None
        assert svg.get("role") == "img"
        assert svg.get("aria-label") == figure.findtext("figcaption/strong") != ""
        assert svg.get("viewBox")
    titles = "\n".join(each.text or "" for found in drawn.values() for chart in found for each in _titles(chart))
    for said in ("sdxl-trt, fp32: 51.3 ms ±1.0 %", "PyTorch eager, fp32: 103 ms ±1.0 %", "trt-generate: 2.34 s ±1.0 %",
                 "sdxl-trt, fp32: 0.975 s at 2 pictures at once", "PyTorch eager, fp32: 1.13 s at 1 share of the base",
                 "sdxl-trt, fp32, refiner UNet: 0.0923 s", "fp32, pixels: 81.3 dB", "fp32, embeddings: equal",
                 ):  # fmt: skip
        assert said in titles, said


def _titles(chart: str) -> list[ET.Element]:
    return list(ET.fromstring(chart).iter("title"))


def test_a_chart_without_figures_is_left_out(empty: BenchReport, report: BenchReport) -> None:
    assert not [chart for found in charts(empty).values() for chart in found]
    plain_picture = msgspec.structs.replace(report.measurements[0], stages={})
    few = msgspec.structs.replace(report, measurements=(plain_picture,), cold_starts=(), quality=())
    assert not [chart for found in charts(few).values() for chart in found]
    assert "<svg" not in page(few)


@pytest.mark.parametrize("seconds", [0.0, float("inf"), float("nan")])
def test_what_took_no_time_or_no_finite_one_is_not_drawn(seconds: float, report: BenchReport) -> None:
    odd = Measurement(contestant="eager", what="odd", width=8, height=8, batch=1, seconds=(seconds,))
    picture = msgspec.structs.replace(odd, what="picture", stages={"all": seconds})
    start = msgspec.structs.replace(report.cold_starts[0], seconds=(seconds,))
    few = msgspec.structs.replace(report, measurements=(odd, picture), cold_starts=(start,), quality=())
    assert not [chart for found in charts(few).values() for chart in found]


@pytest.mark.parametrize("seconds", [0.0, 5e-324, 1e-12, 1e12, 1e99, 1.7e308])
def test_any_duration_can_be_shown(seconds: float, report: BenchReport) -> None:
    odd = [
        Measurement(contestant="eager", what=what, sweep=sweep, width=8, height=8, batch=batch, seconds=(seconds,) * 2,
                    stages={"all": seconds})
        for what in ("picture", "odd") for sweep, batch in (("", 1), ("batch", 1), ("batch", 2))
    ]  # fmt: skip
    tree = _parsed(msgspec.structs.replace(report, measurements=tuple(odd), floors={"odd": seconds}))
    for each in tree.iter():
        for key in ("d", "x", "y", "width", "cx", "cy"):
            value = each.get(key, "")
            assert "nan" not in value
            assert "inf" not in value
            assert all(-1 <= float(number) <= 2000 for number in re.findall(r"-?\d+\.?\d*(?:e[+-]?\d+)?", value))


@settings(max_examples=15, deadline=None)
@given(st.text(max_size=30))
def test_a_name_is_text_wherever_it_stands(text: str) -> None:
    name = f"<script>alert('&\"')</script>{text}]]>-->"
    report = _named(name)
    tree = _parsed(report)
    assert not list(tree.iter("script"))
    assert plain(name) in _texts(tree)
    assert plain(name) in {each.get("aria-label") for each in tree.iter("svg")}


def test_a_name_cannot_turn_the_direction_of_writing() -> None:
    assert "\u202e" not in page(_named("\u202eevil"))


def _named(name: str) -> BenchReport:
    asked = BenchSettings(bundle=name, model=name, width=8, height=8, batch=1, steps=1, handoff=None, guidance=1.0,
                        seed=0, tokens=77, runs=1, warmups=0, threads=1, prompt=name)  # fmt: skip
    return BenchReport(
        command=(name,), machine={name: name, "processor": name}, versions={name: name}, settings=asked,
        contestants=(Contestant(name=name, title=name, precision=name, versions={name: "1"}, not_run={name: name}),),
        measurements=(
            Measurement(contestant=name, what="picture", width=8, height=8, batch=1, seconds=(1.0,), stages={name: 1}),
            Measurement(contestant=name, what=name, width=8, height=8, batch=1, seconds=(1.0,), sweep=""),
            Measurement(contestant=name, what=name, width=8, height=8, batch=2, seconds=(1.0,), sweep=name),
        ),
        cold_starts=(ColdStart(name=name, command=(name,), seconds=(1.0,), peak_rss=1),),
        quality=(Quality(variant=name, stage=name, psnr=40.0),), bars=(Bar(name, name, name, None),), notes=(name,),
    )  # fmt: skip


def test_the_files_are_one_report(report: BenchReport, tmp_path: Path) -> None:
    write_pages(report, tmp_path / "new/folder")
    folder = tmp_path / "new/folder"
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.md", "report.html"}
    assert read_report(folder / "report.json") == report
    assert (folder / "report.md").read_text() == markdown_report(report)
    assert (folder / "report.html").read_text() == page(report)
