"""A1111's syntax for LoRAs in prompts: what its documentation shows, and what its code does with any text."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.adapters.tags import split_tags, tags_of
from sdxl_trt.runtime.adapters.use import LoraUse


@pytest.mark.parametrize(
    ("prompt", "text", "uses"),
    [
        ("a fox", "a fox", ()),
        ("a fox <lora:ink>", "a fox ", (LoraUse("ink"),)),
        ("a <lora:ink:0.8> fox", "a  fox", (LoraUse("ink", 0.8),)),
        ("<lora:ink:.5:-2>", "", (LoraUse("ink", -2.0, 0.5),)),
        ("<lora:ink:unet=2:te=0.5>", "", (LoraUse("ink", 2.0, 0.5),)),
        ("<lora:ink:te=0.5>", "", (LoraUse("ink", 0.5),)),
        ("<lora:ink:0.3:0.4:te=0.5>", "", (LoraUse("ink", 0.4, 0.5),)),
        ("<lyco:style/ink v2:1>(a:1.2)<lora:b:1>", "(a:1.2)", (LoraUse("style/ink v2"), LoraUse("b"))),
        ("<3 a < b > c, <b:x> <lora>", "<3 a < b > c, <b:x> <lora>", ()),
        ("<lora:a:1><lora:a:0.5>", "", (LoraUse("a"), LoraUse("a", 0.5))),
    ],
)
def test_tags_are_read_and_removed_as_in_a1111(prompt: str, text: str, uses: tuple[LoraUse, ...]) -> None:
    assert split_tags(prompt) == (text, uses)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("<hypernet:ink:1>", "'<hypernet:ink:1>', which is not a LoRA"),
        ("<LoRA:ink:1>", "'<LoRA:ink:1>', which is not a LoRA"),
        ("<lora:ink:1:1:8>", "with the argument 'dyn', which is not supported"),
        ("<lora:ink:dyn=8>", "with the argument 'dyn', which is not supported"),
        ("<lora:ink:1:lbw=OUTALL>", "with the argument 'lbw', which is not supported"),
        ("<lora::1>", "names no file"),
        ("<lora:te=1>", "names no file"),
        ("<lora:ink:much>", "in which 'much' is not a finite number"),
        ("<lora:ink:nan>", "in which 'nan' is not a finite number"),
        ("<lora:ink:te=inf>", "in which 'inf' is not a finite number"),
        ("a fox <lora:ink:0.8", "'<lora:ink:0.8' without a >"),
    ],
)
def test_what_is_not_supported_is_one_line(prompt: str, says: str) -> None:
    assert tags_of(prompt)
    with pytest.raises(UsageError, match=re.escape(says)) as caught:
        split_tags(prompt)
    assert "<lora:NAME:TE_SCALE:UNET_SCALE>" in str(caught.value)


NAMES = st.text(st.characters(exclude_characters="<>:=", exclude_categories=["Cs"]), min_size=1, max_size=20)
SCALES = st.floats(allow_nan=False, allow_infinity=False).map(lambda value: f"{value:g}")
PLAIN = st.text(st.characters(exclude_characters="<>"), max_size=20)


NAMED = st.dictionaries(st.sampled_from(["te", "unet"]), SCALES)


@given(st.lists(st.tuples(PLAIN, NAMES, st.lists(SCALES, max_size=2), NAMED), max_size=4), PLAIN)
def test_any_tags_leave_the_text_between_them(tags: list[tuple[str, str, list[str], dict[str, str]]], end: str) -> None:
    written = [
        (before, ":".join(["<lora", name, *scales, *(f"{key}={value}" for key, value in named.items())]) + ">")
        for before, name, scales, named in tags
    ]
    text, uses = split_tags("".join(before + tag for before, tag in written) + end)
    assert text == "".join(before for before, _ in written) + end
    for use, (_, name, scales, named) in zip(uses, tags, strict=True):
        te = float(named.get("te", scales[0] if scales else "1"))
        unet = float(named.get("unet", scales[1] if len(scales) > 1 else te))
        assert (use.path, use.scale, use.scale if use.text_scale is None else use.text_scale) == (name, unet, te)


@given(st.text(st.sampled_from("<>:=a1. lorayc")) | st.text())
def test_any_text_is_split_or_refused(prompt: str) -> None:
    try:
        text, uses = split_tags(prompt)
    except UsageError:
        text, uses = "", ()
        assert tags_of(prompt)
    assert not tags_of(text)
    assert all(use.path and math.isfinite(use.scale) for use in uses)
    assert uses or text == prompt or tags_of(prompt)
