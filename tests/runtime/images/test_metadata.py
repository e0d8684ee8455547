"""What a picture says of its making: read again by others' rules, and by ours without trusting it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.cli.options import check_alone_with_workflow, make_parser
from sdxl_trt.runtime.cli.repeat import repeated
from sdxl_trt.runtime.images.files import PARAMETERS, SETTINGS, WORKFLOW, save_image
from sdxl_trt.runtime.images.metadata import describe
from sdxl_trt.runtime.images.provenance import BundleName
from sdxl_trt.runtime.pipeline.record import ImageSettings, parse_settings, read_settings

MADE: dict[str, Any] = {
    "prompt": "a red fox", "prompt_2": "a red fox", "negative": "blurry", "negative_2": "blurry", "seed": 2**64 - 1,
    "steps": 30, "handoff_step": 23, "guidance": 7.5, "refiner_guidance": 5.0, "guidance_rescale": 0.0,
    "guidance_interval": (0.0, 1.0), "sampler": "dpmpp_2m_sde", "refiner_sampler": "euler",
    "schedule": "trailing+karras", "width": 1024, "height": 768, "aesthetic_score": 6.0,
    "negative_aesthetic_score": 2.5, "tile": False, "injected_latents": False,
}  # fmt: skip
# How A1111's web UI reads the last line of its text: names, and values quoted or without a comma.
FACT = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def _save(folder: Path, metadata: Any, name: str = "made.png") -> Path:
    path = folder / name
    save_image(Image.new("RGB", (8, 8)), path, describe(metadata))
    return path


def test_the_parameters_are_in_the_words_of_a1111() -> None:
    *prompt, negative, last = describe(MADE)[PARAMETERS].split("\n")
    assert prompt == ["a red fox"]
    assert negative == "Negative prompt: blurry"
    assert dict(FACT.findall(last)) == {
        "Steps": "30", "Sampler": "DPM++ 2M SDE", "Schedule type": "Karras", "CFG scale": "7.5",
        "Seed": "18446744073709551615", "Size": "1024x768", "Refiner switch at": "0.76",
        "Refiner switch by sampling steps": "True",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("", None), ("leading", None), ("trailing", "Simple"), ("karras", "Karras"), ("sgm_uniform", "SGM Uniform")],
)
def test_a_schedule_that_a1111_has_not_is_not_named(schedule: str, expected: str | None) -> None:
    *_, last = describe(MADE | {"schedule": schedule})[PARAMETERS].split("\n")
    assert dict(FACT.findall(last)).get("Schedule type") == expected


def test_models_and_sweeps_are_facts_that_do_not_break_the_line() -> None:
    bundle = {"digest": "0" * 12, "base": "owner/base, best", "refiner": "fine"}
    text = describe(MADE | {"bundle": bundle, "sweep": ["handoff=0.5,none", "seed=1"]})[PARAMETERS]
    facts = dict(FACT.findall(text.split("\n")[-1]))
    assert facts["Model"] == '"owner/base, best"'
    assert facts["Refiner"] == "fine"
    assert facts["Sweep"] == '"handoff=0.5,none x seed=1"'


def test_the_base_alone_switches_nowhere() -> None:
    text = describe(MADE | {"handoff_step": None, "negative": None})[PARAMETERS]
    assert "Refiner" not in text
    assert "Negative" not in text


def _a1111_switches_at(share: float, steps: int, calls: int) -> int:
    """Return the step that A1111's refiner takes first: apply_refiner, told to go by sampling steps."""
    for call in range(calls * steps):
        completed_ratio = call / (calls * steps)
        if not completed_ratio < share:
            return call // calls if call % calls == 0 else -1
    return steps


def _facts(metadata: dict[str, Any]) -> dict[str, str]:
    return dict(FACT.findall(describe(metadata)[PARAMETERS].split("\n")[-1]))


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 25, 30, 49, 50, 51, 100, 333, 1000])
@pytest.mark.parametrize("calls", [1, 2], ids=["first order", "second order"])
def test_a1111_changes_to_the_refiner_at_the_same_step(steps: int, calls: int) -> None:
    for cut in {*range(1, min(steps, 60)), *range(1, steps, 37)}:
        facts = _facts(MADE | {"steps": steps, "handoff_step": cut})
        assert facts["Refiner switch by sampling steps"] == "True"
        share = facts["Refiner switch at"]
        assert _a1111_switches_at(float(share), steps, calls) == cut
        assert len(share) <= 4 or steps > 50, "its slider knows hundredths"


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("steps", [10, 20, 30])
def test_a1111_changes_at_the_same_noise_from_a_picture(steps: int, strength: float) -> None:
    t_enc = int(min(strength, 0.999) * steps)  # setup_img2img_steps
    grid = list(range(steps))[steps - t_enc - 1 :]  # sample_img2img: sigmas[steps - t_enc - 1:]
    for cut in range(steps - int(steps * strength) + 1, steps):
        facts = _facts(MADE | {"steps": steps, "handoff_step": cut, "strength": strength})
        assert grid[_a1111_switches_at(float(facts["Refiner switch at"]), t_enc + 1, 1)] == cut


def test_the_refiner_alone_is_the_model() -> None:
    bundle = {"digest": "0" * 12, "base": "base", "refiner": "fine"}
    facts = _facts(MADE | {"bundle": bundle, "handoff_step": None, "refine": True, "strength": 0.3})
    assert facts["Model"] == "fine"
    assert not any(name.startswith("Refiner") for name in facts)


@pytest.mark.parametrize(("skip", "told"), [(0, None), (1, "3"), (-1, "1")])
def test_skipped_layers_are_counted_as_a1111_counts_them(skip: int, told: str | None) -> None:
    assert _facts(MADE | {"clip_skip": skip}).get("Clip skip") == told


def test_control_characters_are_left_out_and_marks_are_kept() -> None:
    text = describe(MADE | {"prompt": "fox\0\x1b[31m\r\nred \ud800 👩\u200d🎨"})[PARAMETERS]
    assert text.startswith("fox[31m\nred  👩\u200d🎨\n")


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp"])
def test_settings_come_back_from_every_format(tmp_path: Path, name: str) -> None:
    settings = read_settings(_save(tmp_path, MADE, name))
    assert MADE.items() <= msgspec.structs.asdict(settings).items()


def test_a_picture_without_settings_is_refused(tmp_path: Path) -> None:
    save_image(Image.new("RGB", (8, 8)), tmp_path / "bare.png", {})
    with pytest.raises(UsageError, match="carries no settings"):
        read_settings(tmp_path / "bare.png")
    with pytest.raises(UsageError, match="check the path"):
        read_settings(tmp_path / "none.png")


@pytest.mark.parametrize(
    "change",
    [
        {"steps": "30"}, {"steps": 0}, {"steps": 1e9}, {"steps": True}, {"guidance": 1e300}, {"prompt": None},
        {"prompt": "x" * (1 << 20) + "x"}, {"sampler": "e" * 101}, {"seed": -1}, {"guidance_interval": [0.0]},
        {"guidance_interval": [0.0, 2.0]}, {"handoff_step": -1}, {"later": 1}, {"width": 2.5}, {"tile": "yes"},
        {"bundle": {"digest": "x" * 101, "base": "b"}}, {"bundle": "b"}, {"sweep": ["seed=1"] * 3}, {"sweep": "seed=1"},
        {"handoff": "none"}, {"handoff": 2},
    ],
)  # fmt: skip
def test_settings_of_wrong_type_range_or_length_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        parse_settings(json.dumps(MADE | change), "x.png")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"prompt": "\\ud800"}', "{}", "\ud800"])
def test_what_is_no_settings_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_settings(text, "x.png")
    assert len(str(caught.value)) < 400


def test_settings_without_end_are_not_parsed() -> None:
    with pytest.raises(UsageError, match="longer than 8 MiB"):
        parse_settings('"' + "x" * (8 << 20) + '"', "x.png")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*MADE, "other"]), JSON, max_size=4))
def test_any_change_is_read_or_refused(changes: dict[str, Any]) -> None:
    try:
        settings = parse_settings(json.dumps(MADE | changes), "x.png")
    except UsageError:
        return
    assert isinstance(settings, ImageSettings)
    assert 1 <= settings.steps <= 100_000


@given(st.text() | st.binary().map(lambda content: content.decode("latin-1")))
def test_any_text_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_settings(text, "x.png")


@given(st.text(max_size=200), st.text(max_size=200) | st.none())
def test_any_prompt_is_described_and_comes_back(prompt: str, negative: str | None) -> None:
    texts = describe(MADE | {"prompt": prompt, "negative": negative})
    assert texts[SETTINGS].isascii()
    if not any("\ud800" <= c <= "\udfff" for c in prompt + (negative or "")):
        settings = parse_settings(texts[SETTINGS], "x.png")
        assert (settings.prompt, settings.negative) == (prompt, negative)


def _options(path: Path, *more: str) -> Any:
    return repeated([*more, "--from", str(path)])


def test_a_picture_gives_the_options_that_are_left_out(tmp_path: Path) -> None:
    found = _options(_save(tmp_path, MADE), "--guidance", "5", "--seed", "0")
    assert (found.prompt, found.prompt_2, found.negative, found.negative_2) == ("a red fox", None, "blurry", None)
    assert (found.guidance, found.seed, found.steps, found.handoff_step) == (5.0, 0, 30, 23)
    assert (found.sampler, found.refiner_sampler, found.schedule) == ("dpmpp_2m_sde", "euler", "trailing+karras")
    assert (found.width, found.height, found.guidance_interval, found.no_refiner) == (1024, 768, (0.0, 1.0), False)


def test_what_repeats_another_setting_follows_it(tmp_path: Path) -> None:
    alike = {"refiner_sampler": "dpmpp_2m_sde", "refiner_guidance": 7.5}
    found = _options(_save(tmp_path, MADE | alike), "a blue star", "--sampler", "lcm")
    assert (found.prompt, found.prompt_2, found.refiner_sampler, found.refiner_guidance) == ("a blue star", *[None] * 3)


def test_a_default_that_is_stated_is_an_override(tmp_path: Path) -> None:
    found = _options(_save(tmp_path, MADE | {"steps": 20, "handoff_step": 10}), "--steps", "30", "--sampler", "euler")
    assert (found.steps, found.sampler) == (30, "euler")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], ("auto", 23, False)), (["--steps", "60"], ("auto", 46, False)), (["--steps", "1"], ("auto", 1, False)),
        (["--handoff", "0.5"], (0.5, None, False)), (["--handoff-step", "4"], ("auto", 4, False)),
        (["--no-refiner"], ("auto", None, True)), (["--handoff", "none"], (None, None, False)),
    ],
)  # fmt: skip
def test_a_handoff_is_kept_moved_or_replaced(tmp_path: Path, more: list[str], expected: tuple[Any, ...]) -> None:
    found = _options(_save(tmp_path, MADE), *more)
    assert (found.handoff, found.handoff_step, found.no_refiner) == expected


def test_the_base_alone_stays_alone(tmp_path: Path) -> None:
    alone = {"handoff_step": None, "refiner_guidance": None, "refiner_sampler": None, "aesthetic_score": None,
             "negative_aesthetic_score": None}  # fmt: skip
    found = _options(_save(tmp_path, MADE | alone))
    assert (found.no_refiner, found.aesthetic_score, found.handoff_step) == (True, 6.0, None)


def test_what_a_workflow_made_is_made_by_the_graph_in_the_picture(tmp_path: Path) -> None:
    path = _save(tmp_path, MADE | {"workflow": True, "tile": True, "guidance_rescale": 0.5})
    found, usual = _options(path), make_parser().parse_args([])
    assert (found.workflow, found.tile, found.guidance_rescale, found.sweep) == (path, True, 0.5, [])
    check_alone_with_workflow(found)
    for name in ("prompt", "seed", "steps", "handoff_step", "no_refiner", "width"):
        assert getattr(found, name) == getattr(usual, name), name
    with pytest.raises(UsageError, match="--from and --workflow"):
        _options(path, "--workflow", "other.json")


SHEET = MADE | {
    "sweep": ["handoff=0.5,none", "guidance=3,7.5"], "handoff": 0.6, "handoff_step": None, "refiner_guidance": 7.5,
    "refiner_sampler": None, "negative_aesthetic_score": None,
}  # fmt: skip


def test_a_sheet_gives_its_sweep_and_what_that_varies(tmp_path: Path) -> None:
    path = _save(tmp_path, SHEET)
    found = _options(path)
    assert found.sweep == ["handoff=0.5,none", "guidance=3,7.5"]
    assert (found.handoff, found.handoff_step, found.no_refiner, found.prompt) == (0.6, None, False, "a red fox")
    # One is stated though it is the base's own; the other follows.
    assert (found.refiner_guidance, found.refiner_sampler, found.negative_aesthetic_score) == (7.5, None, None)
    other = _options(path, "a blue star", "--sweep", "seed=1,2", "--handoff-step", "9")
    assert (other.prompt, other.sweep, other.handoff, other.handoff_step) == ("a blue star", ["seed=1,2"], "auto", 9)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"handoff": None}, (None, None, None)), ({"handoff": "auto"}, ("auto", None, None)),
        ({"handoff": "auto", "handoff_sigma": 2.5}, ("auto", None, 2.5)),
        ({"handoff": "auto", "handoff_step": 10}, ("auto", 10, None)),
    ],
)  # fmt: skip
def test_a_sheet_s_handoff_is_the_one_asked_for(tmp_path: Path, asked: Any, expected: tuple[Any, ...]) -> None:
    found = _options(_save(tmp_path, SHEET | {"sweep": ["seed=1,2"]} | asked))
    assert (found.handoff, found.handoff_step, found.handoff_sigma) == expected


def test_a_negative_score_that_is_not_the_usual_one_was_stated(tmp_path: Path) -> None:
    assert _options(_save(tmp_path, MADE)).negative_aesthetic_score is None
    assert _options(_save(tmp_path, MADE | {"negative_aesthetic_score": 3.0})).negative_aesthetic_score == 3.0


def test_the_bundle_goes_along(tmp_path: Path) -> None:
    assert _options(_save(tmp_path, MADE)).made_with is None
    bundle = {"digest": "0" * 12, "base": "sdxl", "refiner": None}
    assert _options(_save(tmp_path, MADE | {"bundle": bundle})).made_with == BundleName("0" * 12, "sdxl")


def test_ends_and_starts_of_their_own_are_no_handoff(tmp_path: Path) -> None:
    found = _options(_save(tmp_path, MADE | {"base_end_step": 20, "refiner_start_step": 23}))
    assert (found.base_end_step, found.refiner_start_step, found.handoff_step) == (20, 23, None)


def test_noise_of_its_own_is_asked_for(tmp_path: Path) -> None:
    path = _save(tmp_path, MADE | {"injected_latents": True})
    with pytest.raises(UsageError, match="--latents"):
        _options(path)
    np.save(tmp_path / "noise.npy", np.zeros(1, np.float32))
    assert _options(path, "--latents", str(tmp_path / "noise.npy")).prompt == "a red fox"


def test_every_setting_that_is_written_is_read(pairs: Any) -> None:
    from sdxl_trt.engines.bundle.bundle import read_bundle
    from sdxl_trt.runtime.pipeline.record import finish
    from sdxl_trt.runtime.pipeline.run import Run
    from sdxl_trt.runtime.request.request import Request
    from sdxl_trt.runtime.request.resolve import resolve_request

    request = Request("a red fox", negative="", width=64, height=64, seed=3)
    comfyui = replace(
        request, compat="comfyui", count=2, base_end_step=20, refiner_start_step=19, refiner_add_noise=True,
        leftover_noise=False, original_size=(96, 64), crop=(4, 8), target_size=(48, 32), clip_skip=1,
    )  # fmt: skip
    for each in (request, replace(request, handoff=None, negative=None, sampler="lcm", tile=True), comfyui):
        manifest = read_bundle(pairs("outline").bundle).manifest
        resolved = resolve_request(each, manifest)
        empty = np.zeros((1, 4, 32, 32), np.float32)
        picture = finish(Run(resolved, empty, empty, asked=each, manifest=manifest), 0, np.zeros((8, 8, 3), np.uint8))
        settings = parse_settings(describe(picture.metadata, picture.graph)[SETTINGS], "x.png")
        assert ("count" in picture.metadata) == (each is comfyui)
        assert picture.metadata["bundle"]["refiner"] == ("refiner" if resolved.uses_refiner else None)
        assert picture.metadata.items() <= msgspec.to_builtins(settings, builtin_types=(tuple,)).items()


def test_a_record_is_read_with_more_loras_than_a_request_may_state(tmp_path: Path) -> None:
    """Each prompt of a workflow, and each of its samplers, may have others."""
    fact = {"name": "ink.safetensors", "sha256": "0" * 64, "scale": 1.0, "short_hash": "0" * 12}
    made = {"loras": [fact] * 40, "refiner_loras": [fact] * 40}
    assert len(read_settings(_save(tmp_path, MADE | made)).loras) == 40


def test_a_graph_is_written_for_comfyui_and_in_its_way_alone(pairs: Any, tmp_path: Path) -> None:
    from sdxl_trt.engines.bundle.bundle import read_bundle
    from sdxl_trt.runtime.comfyui.reader import read_workflow
    from sdxl_trt.runtime.pipeline.record import finish
    from sdxl_trt.runtime.pipeline.run import Run
    from sdxl_trt.runtime.request.request import Request
    from sdxl_trt.runtime.request.resolve import resolve_request

    manifest, empty = read_bundle(pairs("outline").bundle).manifest, np.zeros((1, 4, 32, 32), np.float32)
    for compat in ("diffusers", "comfyui"):
        request = Request("a red fox", width=64, height=64, seed=3, compat=compat)  # type: ignore[arg-type]
        run = Run(resolve_request(request, manifest), empty, empty, asked=request, manifest=manifest)
        picture = finish(run, 0, np.zeros((8, 8, 3), np.uint8))
        assert (WORKFLOW in describe(picture.metadata, picture.graph)) == (compat == "comfyui")
        for name in ("x.png", "x.jpg", "x.webp") if picture.graph else ():
            picture.save(tmp_path / name)
            assert read_workflow(tmp_path / name).samplings[0].positive[0].text_g == "a red fox"
            picture.save(tmp_path / name, metadata=False)
            with pytest.raises(UsageError, match="carries no ComfyUI workflow"):
                read_workflow(tmp_path / name)
