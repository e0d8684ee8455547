"""A1111's prompts, read as its own parser reads them; the expectations are those that its source documents."""

import pytest

from sdxl_trt.runtime.text.weighting import parse_weights
from sdxl_trt.server.a1111.body import Prompt, read_prompt
from sdxl_trt.server.http import ApiError


def _parts(prompt: str) -> list[tuple[str, float]]:
    """Return what ComfyUI's reader finds in the translation."""
    merged: list[tuple[str, float]] = []
    for each in parse_weights(read_prompt("prompt", prompt).text):
        if merged and merged[-1][1] == round(each.weight, 6):
            merged[-1] = merged[-1][0] + each.text, merged[-1][1]
        else:
            merged.append((each.text, round(each.weight, 6)))
    return merged


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        # The examples of parse_prompt_attention.
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
             ("sky", 1.4641), (".", 1.1)],
        ),
        # Nested numbers multiply; in ComfyUI's own syntax the innermost counts.
        ("(a (b:2):3)", [("a ", 3.0), ("b", 6.0)]),
        ("[[faint]]", [("faint", 0.826446)]),
        ("a: b (c: d:1.5)", [("a: b ", 1.0), ("c: d", 1.5)]),
        (r"back\\slash (x:1.2)", [(r"back\slash ", 1.0), ("x", 1.2)]),
        (r"tail\\(x:1.2)", [("tail\\ ", 1.0), ("x", 1.2)]),
        ("a) b] c", [("a) b] c", 1.0)]),
        ("(a:1e5)", [("a:1e5", 1.1)]),
        ("", []),
    ],
)  # fmt: skip
def test_weights_are_those_of_a1111(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert _parts(prompt) == expected


def test_a_plain_prompt_is_left_as_it_is() -> None:
    assert read_prompt("prompt", "a fox, 8k: sharp") == Prompt(*["a fox, 8k: sharp"] * 3)


@pytest.mark.parametrize("prompt", ["a [red:blue:0.5] fox", "[blue:10]", "[a|b] fox", "x BREAK y", "a fox AND a dog",
                                    "<lora:x", "<hypernet:x:1> a", "embedding:x", "[(a:1.2):b: 3]"])  # fmt: skip
def test_what_a_prompt_cannot_say_here_is_refused(prompt: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_prompt("prompt", prompt)
    assert (caught.value.status, caught.value.param) == (422, "prompt")


def test_loras_are_named_by_prompts_alone() -> None:
    prompt = read_prompt("prompt", "a fox <lora:ink_(v2):0.5:0.8>, (big:1.2)")
    assert [(use.path, use.scale, use.text_scale) for use in prompt.loras] == [("ink_(v2)", 0.8, 0.5)]
    assert prompt.text == "a fox , (big:1.2)"
    negative = read_prompt("negative_prompt", "<lora:ink:1>, AND", negative=True)
    assert (negative.loras, negative.text) == ((), "<lora:ink:1>, AND")


def test_an_embedding_is_a_word_of_its_own() -> None:
    names = ("neg", "neg-hands", "two words")
    assert read_prompt("prompt", "a NEG, neg-hands", names).text == "a  embedding:neg ,  embedding:neg-hands "
    assert read_prompt("prompt", "(neg:1.2)", names).text == "( embedding:neg :1.2)"
    for prompt in ("negative", "two words", "xneg", "a fox"):
        assert read_prompt("prompt", prompt, names).text == prompt
