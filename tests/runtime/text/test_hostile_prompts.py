"""Extreme prompts give a picture or a UsageError, in both prompt syntaxes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.pipeline.pipeline import Pipeline

PROMPTS = {
    "nothing": "", "blank": " \t\r\n ", "only opened": "(" * 200, "only closed": ")" * 200, "crossed": ")(:1.2)((",
    "deep": "(" * 5_000 + "fox" + ")" * 5_000, "colons": "(a:1.1:1.2:)", "weights": "(a:nan) (b:inf) (c:-inf) (d:)",
    "backslashes": "\\" * 301, "100 kB": "fox " * 25_000, "100 kB in one word": "x" * 100_000, "NUL": "fox\0red\0",
    "emoji": "🦊" * 300 + "👩\u200d🎨", "marks": "e" + "\u0301" * 1_000, "surrogate": "fox \ud83e", "rtl": "\u202efox",
    "special tokens": "<|startoftext|><|endoftext|>" * 50,
}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(pairs: Callable[[str], Any]) -> Iterator[Pipeline]:
    with open_bundle(pairs("outline").bundle, residency="resident") as opened:
        yield opened


def _drawn_or_refused(pipeline: Pipeline, prompt: str, compat: str) -> None:
    request = Request(prompt, negative=prompt, width=32, height=32, steps=1, seed=1, handoff=None, compat=compat)  # type: ignore[arg-type]
    with contextlib.suppress(UsageError):
        (picture,) = pipeline.generate(request)
        assert picture.image.size == (32, 32)


@pytest.mark.parametrize("compat", ["diffusers", "comfyui"])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_an_extreme_prompt_is_drawn_or_refused(pipeline: Pipeline, prompt: str, compat: str) -> None:
    _drawn_or_refused(pipeline, prompt, compat)


@settings(suppress_health_check=[HealthCheck.too_slow], derandomize=True, deadline=None, max_examples=8)
@given(prompt=st.text(max_size=60) | st.text("()[]:\\.0123456789 ab", max_size=60))
def test_any_prompt_is_drawn_or_refused(pipeline: Pipeline, prompt: str) -> None:
    for compat in ("diffusers", "comfyui"):
        _drawn_or_refused(pipeline, prompt, compat)
