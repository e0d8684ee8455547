"""Sweeps: their variants, what is refused, and the sheet that labels them."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.images.sheet import Sheet, _wrapped, draw_sheet
from sdxl_trt.runtime.pipeline.sweep import Axis, Sweep, parse_axis
from sdxl_trt.runtime.request.handoff import StepRange
from sdxl_trt.runtime.request.request import Request
from sdxl_trt.runtime.request.side import Side

FOX = Request("a red fox", steps=10, seed=5)


def _sweep(*texts: str, request: Request = FOX, **options: bool) -> Sweep:
    return Sweep(request, [parse_axis(text) for text in texts], **options)


def test_a_sweep_of_handoffs_may_include_the_base_alone() -> None:
    requests = _sweep("handoff=0.25, 0.8,none", request=replace(FOX, handoff_step=3)).requests
    assert [(each.handoff, each.handoff_step) for each in requests] == [(0.25, None), (0.8, None), (None, None)]
    requests = _sweep("handoff-step=2,none", request=replace(FOX, handoff=0.5)).requests
    assert [(each.handoff, each.handoff_step) for each in requests] == [("auto", 2), (None, None)]


@pytest.mark.parametrize(
    ("text", "field", "values"),
    [
        ("guidance=1,7.5", "guidance", [1.0, 7.5]), ("refiner-guidance=3", "refiner_guidance", [3.0]),
        ("seed=1,18446744073709551615", "seed", [1, 2**64 - 1]), ("steps=10,20", "steps", [10, 20]),
        ("sampler=euler,dpmpp_2m", "sampler", ["euler", "dpmpp_2m"]),
    ],
)  # fmt: skip
def test_other_keys_vary_only_their_setting(text: str, field: str, values: list[Any]) -> None:
    requests = _sweep(text).requests
    assert [getattr(each, field) for each in requests] == values
    assert all(replace(each, **{field: getattr(FOX, field)}) == FOX for each in requests)


def test_the_negative_score_follows_unless_it_is_kept() -> None:
    both = [(each.aesthetic_score, each.negative_aesthetic_score) for each in _sweep("aesthetic-score=4,8").requests]
    assert both == [(4.0, 4.0), (8.0, 8.0)]
    kept = _sweep("aesthetic-score=4,8", keep_negative=True).requests
    assert [each.negative_aesthetic_score for each in kept] == [2.5, 2.5]


def test_two_axes_make_a_grid_row_by_row() -> None:
    sweep = _sweep("seed=1,2", "handoff=0.5,0.6,none")
    assert [(each.seed, each.handoff) for each in sweep.requests] == [
        (1, 0.5), (1, 0.6), (1, None), (2, 0.5), (2, 0.6), (2, None),
    ]  # fmt: skip
    assert sweep.settings(4) == {"seed": 2, "handoff": 0.6}


SIDES = (Side(text="a", text_2="b"), Side(text="", text_2="", aesthetic_score=2.0))
WORKFLOW = Request(
    "a", compat="comfyui", steps=50, seed=1, count=1, width=64, height=64, guidance=8.0, base_end_step=40,
    leftover_noise=True, base_sides=SIDES, refiner_start_step=40, refiner_end_step=10_000, refiner_guidance=8.0,
    refiner_sampler="euler", refiner_seed=9, refiner_sides=SIDES,
)  # fmt: skip


def test_the_numbers_of_a_workflows_nodes_are_varied() -> None:
    cuts = _sweep("handoff-step=12,none", request=WORKFLOW).requests
    assert [(each.base_end_step, each.refiner_start_step, each.handoff) for each in cuts] == [
        (12, 12, "auto"), (None, None, None),
    ]  # fmt: skip
    alone = replace(WORKFLOW, refiner_sides=None, refiner_seed=None, refiner_guidance=None, refiner_sampler=None,
                    refiner_start_step=None, refiner_end_step=None, handoff=None, base_end_step=None,
                    leftover_noise=None)  # fmt: skip
    assert cuts[1] == alone
    (scored,) = _sweep("aesthetic-score=4", request=WORKFLOW).requests
    assert [side.aesthetic_score for side in scored.refiner_sides or ()] == [4.0, 4.0]
    (seeded,) = _sweep("seed=5", request=WORKFLOW).requests
    assert (seeded.seed, seeded.refiner_seed) == (5, 5)
    (guided,) = _sweep("guidance=3", request=WORKFLOW).requests
    assert (guided.guidance, guided.refiner_guidance) == (3.0, 8.0)


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        ("handoff=0.5,none", {}, "sweep handoff-step=…"), ("seed=1,2", {"count": 2}, "batch_size from 2 to 1"),
        ("aesthetic-score=4", {"refiner_sides": None}, "no refiner's sampler"),
        ("handoff-step=4", {"refiner_sides": None}, "no refiner's sampler"),
        ("handoff-step=4", {"refiner_strength": 0.3}, "whose refiner has a denoise"),
        ("handoff-step=4,none", {"refine": True}, "whose refiner has a denoise"),
    ],
)  # fmt: skip
def test_settings_that_a_workflow_lacks_cannot_be_varied(text: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _sweep(text, request=replace(WORKFLOW, **change))


@given(st.lists(st.one_of(st.none(), st.floats(0.01, 0.99)), min_size=1, max_size=5, unique=True),
       st.lists(st.floats(-100, 100), min_size=1, max_size=4, unique=True))  # fmt: skip
def test_the_text_of_an_axis_is_parsed_as_the_same_axis(cuts: list[float | None], scores: list[float]) -> None:
    for axis in (Axis("handoff", tuple(cuts)), Axis("aesthetic-score", tuple(scores))):
        assert parse_axis(axis.text) == axis


def test_a_sheet_records_the_common_settings_and_the_sweep() -> None:
    request = replace(FOX, handoff=0.6, refiner_guidance=3.0, negative_aesthetic_score=2.5)
    cell = {"prompt": "a red fox", "handoff_step": 5, "refiner_guidance": 7.0, "negative_aesthetic_score": 4.0}
    meta = _sweep("aesthetic-score=4,8", "guidance=3,7", request=request).sheet_metadata(cell)
    assert meta["sweep"] == ["aesthetic-score=4,8", "guidance=3,7"]
    assert (meta["prompt"], meta["handoff"], meta["handoff_step"], meta["guidance"]) == ("a red fox", 0.6, None, 5.0)
    assert (meta["refiner_guidance"], meta["refiner_sampler"], meta["negative_aesthetic_score"]) == (3.0, None, None)
    assert _sweep("guidance=3,7").sheet_metadata(cell | {"sampler": "lcm"})["sampler"] == "lcm", "the bundle's own"
    kept = _sweep("aesthetic-score=4,8", request=request, keep_negative=True).sheet_metadata(cell)
    assert kept["negative_aesthetic_score"] == 2.5


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["colour=red"], "one of these keys: seed, steps, handoff"), (["handoff"], "handoff takes fractions"),
        (["handoff=0.5,"], "takes fractions"), (["handoff=half"], "takes fractions"), (["guidance=nan"], "numbers"),
        (["seed=1.5"], "whole numbers"), (["sampler=,"], "names of samplers"), (["seed=1,1"], "twice"),
        (["seed=1", "seed=2"], "one or two different"), (["seed=1", "steps=4", "guidance=2"], "one or two different"),
        (["handoff=0.5", "handoff-step=2"], "one or two different"),
        (["seed=" + ",".join(map(str, range(101)))], "at most 100"),
    ],
)  # fmt: skip
def test_invalid_axes_are_refused(texts: Sequence[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _sweep(*texts)


def test_several_pictures_per_cell_are_refused() -> None:
    with pytest.raises(UsageError, match="leave -n out"):
        _sweep("seed=1,2", request=replace(FOX, count=2))
    with pytest.raises(UsageError, match="--latents"):
        _sweep("seed=1,2", request=replace(FOX, latents=np.zeros((1, 4, 2, 2), np.float32)))


@given(st.text(max_size=60) | st.builds("{}={}".format, st.sampled_from(["handoff", "seed", "steps"]), st.text()))
def test_any_text_is_an_axis_or_refused(text: str) -> None:
    try:
        axis = parse_axis(text)
    except UsageError:
        return
    assert axis.values
    assert all(axis.title(value) for value in axis.values)


COLOURS = [(200, 30, 30), (30, 160, 60), (40, 60, 200), (240, 200, 40), (160, 60, 180), (20, 20, 20)]


def _squares(count: int, size: tuple[int, int]) -> list[Image.Image]:
    return [Image.new("RGB", size, colour) for colour in COLOURS[:count]]


def _boxes(page: Image.Image, count: int) -> list[tuple[int, int, int, int]]:
    """Return the box of each colour: left, top, right, bottom."""
    pixels = np.asarray(page)
    boxes = []
    for colour in COLOURS[:count]:
        rows, columns = np.nonzero((pixels == colour).all(axis=-1))
        boxes.append((int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1))
    return boxes


@pytest.mark.parametrize(
    ("size", "shown"),
    [((128, 128), (256, 256)), ((100, 60), (200, 120)), ((300, 200), (300, 200)), ((1024, 512), (384, 192))],
)
def test_pictures_are_shown_in_full_in_rows(size: tuple[int, int], shown: tuple[int, int]) -> None:
    captions = [(f"cell {k}", "more") for k in range(5)]
    page = draw_sheet(Sheet(_squares(5, size), captions, 3, "a prompt", "aside", "notes"))
    boxes = _boxes(page, 5)
    assert {(right - left, bottom - top) for left, top, right, bottom in boxes} == {shown}
    assert boxes[0][0] == boxes[3][0]
    assert boxes[0][1] == boxes[2][1]
    assert boxes[2][2] + 24 <= page.width
    assert boxes[4][3] + 24 <= page.height


def test_every_cell_of_a_grid_has_its_titles_and_caption() -> None:
    runs = [
        SimpleNamespace(
            request=SimpleNamespace(
                prompt=SimpleNamespace(text="a red fox"), negative=SimpleNamespace(text="bad"), seeds=(5,),
                request=Request(steps=10, sampler="euler", guidance=5.0), width=128, height=128, image=None,
                base=StepRange(0, cut), refiner=StepRange(cut, 10) if cut < 10 else None,
            ),
            manifest=None,
        )
        for cut in (5, 8, 10, 5, 8, 10)
    ]  # fmt: skip
    sweep = _sweep("aesthetic-score=4,8", "handoff=0.5,0.8,none")
    page = sweep.sheet(_squares(6, (128, 128)), runs)  # type: ignore[arg-type]
    boxes = _boxes(page, 6)
    ink = np.asarray(page.convert("L")) < 200
    for index, (left, _, right, bottom) in enumerate(boxes):
        assert ink[bottom + 4 : bottom + 20, left:right].any(), f"cell {index} has no caption"
    for left, top, right, _ in boxes[:3]:
        assert ink[top - 24 : top, left:right].any(), "a column has no title"
    for left, top, _, bottom in (boxes[0], boxes[3]):
        assert ink[top:bottom, : left - 4].any(), "a row has no title"


def test_captions_of_narrow_pictures_do_not_overlap() -> None:
    page = draw_sheet(Sheet(_squares(2, (40, 1000)), [("a caption that is wider than its picture", "")] * 2, 2))
    first, second = _boxes(page, 2)
    ink = (np.asarray(page.convert("L")) < 200)[first[3] + 4 :].any(axis=0)
    assert ink[second[0] :].any()
    assert not ink[second[0] - 10 : second[0]].any()


@pytest.mark.parametrize("prompt", ["very " * 25_000, "x" * 100_000, "狐" * 100_000, "(" * 700 + " fox" * 9, ""])
def test_a_prompt_of_any_length_fits_on_the_sheet(prompt: str) -> None:
    page = draw_sheet(Sheet(_squares(1, (64, 64)), [("x", "")], 1, prompt, prompt, "notes"))
    assert page.width == 512 + 2 * 32
    assert page.height < 800
    ink = np.asarray(page.convert("L")) < 200
    assert not ink[:, :32].any()
    assert not ink[:, -32:].any(), "a line crosses the margin"


def test_every_word_of_a_prompt_is_on_the_sheet_if_there_is_room() -> None:
    font = ImageFont.load_default(15)
    words = [f"word{k}," for k in range(60)]
    lines = _wrapped(" ".join(words), 500, font, 8)
    assert " ".join(lines).split() == words
    assert max(font.getlength(line) for line in lines) <= 500
    assert "".join(_wrapped("x" * 300, 500, font, 8)) == "x" * 300
    cut = _wrapped(" ".join(words), 500, font, 2)
    assert len(cut) == 2
    assert cut[1].endswith(" …")
    assert font.getlength(cut[1]) <= 500


def test_characters_that_the_font_lacks_are_replaced() -> None:
    assert _wrapped("Füchse, 红狐 “fox” ½", 500, ImageFont.load_default(15), 1) == ["Fuchse, ?? “fox” 1?2"]


def test_pictures_of_several_sizes_keep_their_aspect_ratio_and_are_aligned() -> None:
    squares = [Image.new("RGB", size, colour) for size, colour in zip(((512, 256), (256, 512)), COLOURS, strict=False)]
    first, second = _boxes(draw_sheet(Sheet(squares, [("a", ""), ("b", "")], 2)), 2)
    assert (first[2] - first[0], first[3] - first[1]) == (384, 192)
    assert (second[2] - second[0], second[3] - second[1]) == (192, 384)
    assert first[3] == second[3]
    assert second[0] > first[2]
