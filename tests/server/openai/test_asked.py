"""Bodies of /v1/images: every field of the contract is used, refused or ignored as it says."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.server.http import ApiError
from sdxl_trt.server.openai.body.asked import Asked, NamedLora, Output, read_asked

FOX = {"prompt": "a red fox"}
FIELDS = [
    "prompt", "model", "n", "size", "quality", "response_format", "output_format", "output_compression", "background",
    "stream", "partial_images", "moderation", "user", "safety_identifier", "style", "complexity", "input_fidelity",
    "frame_count", "frame_duration_ms", "svg", "markup", "negative_prompt", "num_inference_steps", "steps",
    "guidance_scale", "cfg_scale", "seed", "sampler", "scheduler", "handoff", "refiner_switch_at",
    "refiner_guidance_scale", "aesthetic_score", "negative_aesthetic_score", "strength", "compat", "loras", "cache",
    "refiner_cache",
]  # fmt: skip


def _error(body: dict[str, Any], **options: bool) -> tuple[int, str, str]:
    with pytest.raises(ApiError) as caught:
        read_asked(body, **options)
    return caught.value.status, caught.value.code, caught.value.param


def test_a_prompt_alone_takes_every_default() -> None:
    assert read_asked(FOX) == Asked("a red fox")
    assert read_asked(FOX | dict.fromkeys(set(FIELDS) - {"prompt", "handoff", "refiner_switch_at", "strength"})) == (
        Asked("a red fox")
    )


def test_every_setting_is_taken() -> None:
    asked = read_asked(
        FOX
        | {
            "model": "m", "n": 10, "size": "1024x768", "quality": "hd", "response_format": "url",
            "output_format": "webp", "output_compression": 80, "stream": True, "partial_images": 3,
            "negative_prompt": "blur", "steps": 20, "guidance_scale": 7.5, "seed": 2**64 - 1, "sampler": "heun",
            "scheduler": "trailing", "handoff": 0.7, "refiner_guidance_scale": 3, "aesthetic_score": 7.5,
            "negative_aesthetic_score": 0, "cache": 2, "refiner_cache": 3, "loras": ["a", {"name": "b",
            "scale": 0.5, "text_scale": 0}],
        }
    )  # fmt: skip
    assert asked == Asked(
        "a red fox", "m", 10, (768, 1024), "hd", Output("webp", 80), False, True, True, 3, "blur", 20, 7.5, 3.0,
        2**64 - 1, "heun", "trailing", 0.7, 7.5, 0.0, None, "diffusers", 2, 3,
        (NamedLora("a"), NamedLora("b", 0.5, 0.0)),
    )  # fmt: skip


def test_other_names_of_fields_are_the_same_fields() -> None:
    other = {"num_inference_steps": 9, "cfg_scale": 3.5, "refiner_switch_at": 0.6}
    assert read_asked(FOX | other) == read_asked(FOX | {"steps": 9, "guidance_scale": 3.5, "handoff": 0.6})
    assert read_asked(FOX | {"steps": 9, "num_inference_steps": 9}).steps == 9
    assert _error(FOX | {"steps": 9, "num_inference_steps": 8})[2] == "num_inference_steps"
    assert _error(FOX | {"handoff": 0.5, "refiner_switch_at": 0.5})[2] == "refiner_switch_at"


def test_no_handoff_and_a_drawn_seed_are_said_by_null() -> None:
    assert read_asked(FOX | {"handoff": None}).handoff is None
    assert read_asked(FOX | {"refiner_switch_at": None}).handoff is None
    assert read_asked(FOX | {"seed": -1}).seed is None
    assert read_asked(FOX | {"handoff": "null"}, form=True).handoff is None


@pytest.mark.parametrize(("name", "values"), {
    "prompt": ["", None, 7, "x" * 32_001, "\ud800"],
    "n": [0, 11, -1, 1.5, "2", True, 1e308, 2**64],
    "size": ["big", "64", "64x", "-64x64", "64X64", 64, "6٤x64", "9999999x64"],
    "quality": ["best", 1],
    "response_format": ["file", True],
    "output_format": ["gif", "svg", "jpg"],
    "output_compression": [-1, 101, 0.5],
    "background": ["transparent", "red"],
    "stream": ["true", 1],
    "partial_images": [-1, 4],
    "frame_count": [1], "frame_duration_ms": [1], "svg": [{}], "markup": ["x"],
    "steps": [0, -3, 1.5, True], "num_inference_steps": [0],
    "aesthetic_score": ["6", -0.5, 1000.5, True, float("nan")], "negative_aesthetic_score": [-1],
    "guidance_scale": ["5", -1, 101, float("nan"), float("inf"), 10**400, True],
    "seed": [-2, 2**64, 0.5, "7", 1e308],
    "sampler": ["no such sampler", 3], "scheduler": [3],
    "handoff": [0, 1, -0.5, "none", 1e308], "refiner_switch_at": [0, 1.5],
    "refiner_guidance_scale": [[]], "compat": ["a1111"], "cache": [0, 1.5, "2", 10**6], "refiner_cache": [0],
    "loras": [3, [3], [{"scale": 1}], [{"name": "a", "weight": 1}], [{"name": "a", "scale": "x"}], ["a"] * 33],
}.items())  # fmt: skip
def test_a_wrong_value_names_its_field(name: str, values: list[Any]) -> None:
    for value in values:
        status, _, param = _error(FOX | {name: value})
        assert (status, param) == (400, name)


def test_unknown_fields_are_refused_or_named() -> None:
    assert _error(FOX | {"sed": 7}) == (400, "unknown_parameter", "sed")
    assert _error(FOX | {"strength": 0.5}) == (400, "unknown_parameter", "strength")
    assert read_asked(FOX | {"sed": 7}, lenient=True).warnings == ("sed: is unknown, and has no effect",)
    assert read_asked(FOX | {"é" * 500: 1}, lenient=True).warnings[0].isascii()
    assert read_asked(FOX | {"strength": 0.5}, edit=True).strength == 0.5
    assert _error(FOX | {"strength": 0}, edit=True)[2] == "strength"


def test_what_means_nothing_here_is_ignored_in_silence() -> None:
    ignored = dict.fromkeys(["moderation", "user", "safety_identifier", "style", "complexity", "input_fidelity"], "x")
    assert read_asked(FOX | ignored | {"background": "opaque", "partial_images": 2, "output_compression": 5}) == Asked(
        "a red fox", partial_images=2, output=Output("png", 5)
    )


@pytest.mark.parametrize(
    ("model", "form", "base64", "url"),
    [
        (None, None, True, False),
        ("gpt-image-1", None, True, False),
        ("dall-e-2", None, True, True),
        ("dall-e-3", "b64_json", True, False),
        ("dall-e-3", "url", False, True),
        ("m", "url", False, True),
    ],
)
def test_an_answer_has_base64_or_a_url(model: str, form: str, base64: bool, url: bool) -> None:
    asked = read_asked(FOX | {"model": model, "response_format": form})
    assert (asked.as_base64, asked.as_url) == (base64, url)


def test_a_form_says_everything_as_text() -> None:
    body = {"prompt": "null", "n": "2", "stream": "true", "partial_images": "1", "seed": "-1", "strength": "0.25",
            "guidance_scale": "7.5", "steps": "", "loras": '[{"name": "a", "scale": 0.5}]', "size": "auto"}  # fmt: skip
    assert read_asked(body, edit=True, form=True) == Asked(
        "null", n=2, stream=True, partial_images=1, strength=0.25, guidance=7.5, loras=(NamedLora("a", 0.5),)
    )
    assert read_asked({"prompt": "p", "loras": "a"}, form=True).loras == (NamedLora("a"),)
    for name, value in {"n": "1.5", "stream": "yes", "seed": "0x7", "guidance_scale": "nan", "steps": "٣"}.items():
        assert _error({"prompt": "p", name: value}, form=True)[2] == name


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=50)
@given(
    st.dictionaries(st.sampled_from(FIELDS) | st.text(), JSON, max_size=8),
    st.dictionaries(st.sampled_from(FIELDS), st.text(), max_size=8),
    st.booleans(),
)
def test_no_body_is_more_than_refused(body: dict[str, Any], form: dict[str, str], lenient: bool) -> None:
    for fields, is_form in ((body, False), (FOX | body, False), (form, True), (FOX | form, True)):
        refused: ApiError | None = None
        try:
            assert 1 <= read_asked(fields, edit=is_form, form=is_form, lenient=lenient).n <= 10
        except ApiError as exc:
            refused = exc
        if refused is not None:
            assert (refused.status, bool(refused.param), "\n" in refused.message) == (400, True, False)
