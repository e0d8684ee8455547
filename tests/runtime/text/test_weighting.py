"""ComfyUI's prompt syntax: weights, escapes, unbalanced parentheses, and chunks of 77."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_trt.engines.bundle.manifest import Tokenizer
from sdxl_trt.engines.bundle.records import FileRecord
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.text.weighting import MAX_DEPTH, Segment, chunked, parse_weights, weigh

BOS, EOS, PAD = 1000, 1001, 7
TOKENIZER = Tokenizer(
    file=FileRecord(file="t", size=0, sha256="0" * 64), max_length=77, bos_id=BOS, eos_id=EOS, pad_id=PAD
)


def _encode(text: str) -> list[int]:
    """Return one token per word: the word's number."""
    return [int(word) for word in text.split()]


def _words(count: int, first: int = 0) -> str:
    return " ".join(str(first + i) for i in range(count))


# ComfyUI's results, derived by hand from its rules.
CASES = {
    "plain": ("a red fox", [("a red fox", 1.0)]),
    "one pair": ("a (red) fox", [("a ", 1.0), ("red", 1.1), (" fox", 1.0)]),
    "nested pairs multiply": ("((red))", [("red", 1.1 * 1.1)]),
    "a number sets the weight": ("(red:1.3)", [("red", 1.3)]),
    "a number is not multiplied": ("((red:1.3))", [("red", 1.3)]),
    "inner pairs multiply an outer number": ("(a (b):1.5)", [("a ", 1.5), ("b", 1.5 * 1.1)]),
    "the innermost number wins": ("(a (b:0.5):1.5)", [("a ", 1.5), ("b", 0.5)]),
    "the last colon counts": ("(a:b:1.2)", [("a:b", 1.2)]),
    "no number after the colon": ("(a:b)", [("a:b", 1.1)]),
    "nothing before the colon": ("(:1.3)", [(":1.3", 1.1)]),
    "a negative number": ("(a:-1)", [("a", -1.0)]),
    "zero": ("(a:0)", [("a", 0.0)]),
    "spaces in the number": ("(a: 1.2 )", [("a", 1.2)]),
    "escaped": (r"a \(red\) fox", [("a (red) fox", 1.0)]),
    "escaped inside": (r"(a \(b\):1.2)", [("a (b)", 1.2)]),
    "never closed": ("a (red fox", [("a ", 1.0), ("(red fox", 1.0)]),
    "never opened": ("red) fox", [("red) fox", 1.0)]),
    "closed before opened": (")a(b)", [(")a(b)", 1.0)]),
    "one closed of two": ("(a (b)", [("a ", 1.1), ("(b", 1.1)]),
    "empty pair": ("()", []),
    "empty": ("", []),
    "not a number": ("(a:nan)", [("a", math.nan)]),
    "infinite": ("(a:inf)", [("a", math.inf)]),
}


@pytest.mark.parametrize(("prompt", "expected"), CASES.values(), ids=CASES)
def test_weights_are_comfyuis(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert [(part.text, pytest.approx(part.weight, nan_ok=True)) for part in parse_weights(prompt)] == expected


@given(st.text(alphabet="ab() :1.\\\0é😀", max_size=60))
def test_any_text_can_be_parsed(prompt: str) -> None:
    assert all(np.isfinite(part.weight) for part in parse_weights(prompt))


@given(st.text(alphabet="ab :.,é😀", max_size=60))
def test_text_without_parentheses_is_one_segment(prompt: str) -> None:
    assert parse_weights(prompt) == ([Segment(prompt, 1.0)] if prompt else [])


@pytest.mark.parametrize("prompt", ["(" * 50_000 + ")" * 50_000, "(" * (MAX_DEPTH + 2) + "a" + ")" * (MAX_DEPTH + 2)])
def test_deep_nesting_is_refused_at_once(prompt: str) -> None:
    with pytest.raises(UsageError, match="nests"):
        parse_weights(prompt)


def test_many_unbalanced_parentheses_are_text() -> None:
    assert parse_weights("(" * 50_000) == [Segment("(" * 50_000, 1.0)]
    assert parse_weights(")" * 50_000) == [Segment(")" * 50_000, 1.0)]


def test_a_short_prompt_is_one_padded_chunk() -> None:
    (chunk,) = chunked([Segment("3 4", 1.0), Segment("5", 1.5)], TOKENIZER, _encode, list)
    assert chunk.ids.tolist() == [BOS, 3, 4, 5, EOS] + [PAD] * 72
    assert chunk.weights.tolist() == [1, 1, 1, 1.5] + [1] * 73
    assert (chunk.ids.dtype, chunk.weights.dtype) == (np.int64, np.float32)


def test_an_empty_prompt_is_one_empty_chunk() -> None:
    (chunk,) = chunked([], TOKENIZER, _encode, list)
    assert chunk.ids.tolist() == [BOS, EOS] + [PAD] * 75


def test_75_tokens_fill_a_chunk_and_one_more_starts_another() -> None:
    assert len(chunked([Segment(_words(75), 1.0)], TOKENIZER, _encode, list)) == 1
    first, second = chunked([Segment(_words(76), 1.0)], TOKENIZER, _encode, list)
    assert first.ids.tolist() == [BOS, *range(75), EOS]
    assert second.ids.tolist() == [BOS, 75, EOS] + [PAD] * 74


def test_a_short_segment_moves_whole_and_a_long_one_is_split() -> None:
    head = Segment(_words(70), 1.0)
    first, second = chunked([head, Segment(_words(7, 500), 1.2)], TOKENIZER, _encode, list)
    assert first.ids.tolist() == [BOS, *range(70), EOS] + [PAD] * 5
    assert second.ids[1:8].tolist() == list(range(500, 507))
    first, second = chunked([head, Segment(_words(8, 500), 1.2)], TOKENIZER, _encode, list)
    assert first.ids.tolist() == [BOS, *range(70), *range(500, 505), EOS]
    assert second.ids[1:4].tolist() == [505, 506, 507]
    assert second.weights[:5].tolist() == pytest.approx([1, 1.2, 1.2, 1.2, 1])


@given(st.lists(st.tuples(st.integers(0, 200), st.floats(-2, 2)), max_size=8))
def test_no_token_is_lost_or_reordered(lengths: list[tuple[int, float]]) -> None:
    segments, first = [], 2000
    for length, weight in lengths:
        segments.append(Segment(_words(length, first), weight))
        first += length
    chunks = chunked(segments, TOKENIZER, _encode, list)
    read = [(token, weight) for chunk in chunks for token, weight in zip(chunk.ids, chunk.weights, strict=True)]
    kept = [(int(token), float(weight)) for token, weight in read if token >= 2000]
    expected = [(token, np.float32(part.weight)) for part in segments for token in _encode(part.text)]
    assert kept == expected
    assert all(chunk.ids[0] == BOS and (chunk.ids == EOS).sum() == 1 for chunk in chunks)


def test_weights_scale_positions_relative_to_the_empty_prompt(rng: np.random.Generator) -> None:
    hidden, empty = rng.normal(size=(2, 5, 3)).astype(np.float32)
    weights = np.array([1, 0, 2, -1, 1], np.float32)
    weighted = weigh(hidden, empty, weights)
    assert np.array_equal(weighted[[0, 4]], hidden[[0, 4]])
    assert np.array_equal(weighted[1], empty[1])
    np.testing.assert_allclose(weighted[2], 2 * hidden[2] - empty[2], rtol=1e-6)
    np.testing.assert_allclose(weighted[3], 2 * empty[3] - hidden[3], rtol=1e-6)
    assert weighted.dtype == np.float32
