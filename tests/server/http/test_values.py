"""Numbers in JSON and in texts, and what is said of other values."""

from typing import Any

import pytest

from sdxl_trt.server.http import kind_of, number_of, told_of, whole_of


@pytest.mark.parametrize(
    ("value", "in_json", "in_text"),
    [
        (3, 3, 3), (-3.0, -3, -3), (2.0**53, 2**53, 2**53), (2.0**60, None, None), (3.5, None, None),
        (True, None, None), (None, None, None), ([3], None, None), (float("nan"), None, None), ("3", None, 3),
        (" +3\n", None, 3), ("-12", None, -12), ("3.0", None, None), ("٣", None, None), ("1_0", None, None),
        ("9" * 31, None, None), ("", None, None),
    ],
)  # fmt: skip
def test_whole_numbers(value: Any, in_json: int | None, in_text: int | None) -> None:
    assert whole_of(value, texts=False) == in_json
    assert whole_of(value, texts=True) == in_text


@pytest.mark.parametrize(
    ("value", "in_json", "in_text"),
    [
        (3, 3.0, 3.0), (0.5, 0.5, 0.5), ("0.5", None, 0.5), ("1e400", None, None), ("nan", None, None),
        (10**400, None, None), (float("inf"), None, None), (False, None, None), ({}, None, None), ("x", None, None),
        ("1_0.5", None, None), ("٣.5", None, None), (" -1e3 ", None, -1000.0),
    ],
)  # fmt: skip
def test_numbers(value: Any, in_json: float | None, in_text: float | None) -> None:
    assert number_of(value, texts=False) == in_json
    assert number_of(value, texts=True) == in_text


def test_a_number_is_told_and_of_anything_else_its_kind() -> None:
    assert [told_of(value) for value in (3, 0.5, 10**40)] == ["3", "0.5", "a number"]
    assert [told_of(value) for value in (True, "secret", [], {}, None)] == [
        "true or false", "a text", "a list", "an object", "another kind of value",
    ]  # fmt: skip
    assert kind_of(3) == "a number"
