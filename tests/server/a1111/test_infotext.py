"""A1111's text of a picture's settings: its reader on texts of A1111 itself, and on those of others."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.server.a1111.infotext import parse_infotext

WEBUI = (
    "a fox, (big:1.2)\nsecond line\nNegative prompt: blur,\nlow quality\nSteps: 30, Sampler: DPM++ 2M, Schedule type:"
    ' Karras, CFG scale: 7, Seed: 5, Size: 1024x768, Model hash: 31e35c80fc, Model: "a, b: c", Refiner: sd_xl_refiner'
    ' [7440042bbd], Refiner switch at: 0.8, Lora hashes: "ink: 0123, line: 4567", Version: v1.10.1'
)


def test_a_text_of_a1111_is_read() -> None:
    facts = parse_infotext(WEBUI)
    assert facts["Prompt"] == "a fox, (big:1.2)\nsecond line"
    assert facts["Negative prompt"] == "blur,\nlow quality"
    assert (facts["Steps"], facts["Size-1"], facts["Size-2"]) == ("30", "1024", "768")
    assert (facts["Model"], facts["Lora hashes"]) == ("a, b: c", "ink: 0123, line: 4567")
    assert facts["Refiner switch at"] == "0.8"


@pytest.mark.parametrize("text", ["", "a fox", "Steps: 3", "a: b, c: d", "Negative prompt: x"])
def test_a_text_without_a_line_of_facts_is_a_prompt(text: str) -> None:
    assert parse_infotext(text).keys() == {"Prompt", "Negative prompt"}


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=100) | st.lists(st.sampled_from(["a: b", ", ", '"', "\\", "\n", "1x2", "Negative prompt:"]),
                                        max_size=30).map("".join))  # fmt: skip
def test_any_text_is_read(text: str) -> None:
    assert parse_infotext(text)["Prompt"] is not None
