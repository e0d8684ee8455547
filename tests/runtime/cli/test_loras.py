"""LoRAs on the command line: the commands of the docs, hostile files, the report, and pictures of workflows."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import sdxl_trt
from sdxl_trt.engines.bundle import Bundle
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime import Pipeline, Request
from sdxl_trt.runtime.adapters.use import LoraUse
from sdxl_trt.runtime.cli import generate, series
from sdxl_trt.runtime.cli.generate import main as trt_generate
from sdxl_trt.runtime.cli.options import make_parser, stated_settings
from sdxl_trt.runtime.cli.repeat import repeated
from sdxl_trt.runtime.pipeline import batch as batches
from sdxl_trt.runtime.pipeline.record import finish
from sdxl_trt.runtime.request import resolve_request

MakeLora = Callable[..., Path]
DOCS = Path(sdxl_trt.__file__).parent.parent / "docs" / "adapters.md"
COMMANDS = re.findall(r"^trt-generate (.+)$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
RECIPES = [command for command in COMMANDS if "--steps" in command]


@pytest.fixture
def outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[str]]]:
    """Return a function that runs the command without running engines, and returns its exit code and its errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batches.Batch, "steps", lambda self: iter(()))
    monkeypatch.setattr(series.Series, "finish", lambda *_, **__: {})

    def run(*arguments: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        try:
            code = trt_generate(["a star", "--json", *arguments])
        except SystemExit as exc:  # argparse's own errors
            code = int(exc.code or 0)
        said = capsys.readouterr().err.splitlines()
        return code, [line for line in said if line.startswith("error: ")]

    return run


Outcome = Callable[..., tuple[int, list[str]]]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_docs_are_read(command: str, embedded: Bundle) -> None:
    arguments = make_parser().parse_args(shlex.split(command))
    request = replace(Request(**stated_settings(arguments)), seed=1)
    assert request.loras or "<lora:" in request.prompt
    plain = replace(request, loras=(), prompt=re.sub("<.*>", "", request.prompt))
    resolved = resolve_request(plain, embedded.manifest)
    if command in RECIPES:
        assert not resolved.uses_refiner
        assert resolved.guidance_of("base").wanted == (request.guidance > 1)


def test_the_docs_have_a_recipe_for_every_kind_of_few_steps() -> None:
    named = " ".join(RECIPES)
    assert len(RECIPES) >= 7
    assert all(word in named for word in ("lightning_4step", "lightning_8step", "Hyper-SDXL", "lcm-lora", "comfyui"))


@pytest.mark.parametrize(("sampler", "schedule"), [("euler", "trailing"), ("ddim", "trailing"), ("lcm", "")])
def test_the_refiner_gets_the_steps_that_the_docs_say(sampler: str, schedule: str, embedded: Bundle) -> None:
    taken = {}
    for steps in (4, 8):
        request = Request(sampler=sampler, schedule=schedule, steps=steps, seed=1)  # the default handoff, 0.8
        refiner = resolve_request(request, embedded.manifest).refiner
        taken[steps] = refiner.steps if refiner else 0
    assert taken == {4: 0, 8: 1}


def test_what_is_wrong_with_a_lora_is_one_line_and_an_exit_code(
    outcome: Outcome, make_lora: MakeLora, tmp_path: Path
) -> None:
    make_lora(tmp_path / "ink.safetensors")
    make_lora(tmp_path / "wide.safetensors", "unet", wider=1)
    whole = (tmp_path / "ink.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1])
    (tmp_path / "old.ckpt").write_bytes(b"")
    assert outcome("--lora", "ink.safetensors:0.5", "--lora-dir", ".") == (0, [])
    for arguments, code, says in (
        (["--lora", "gone.safetensors"], 2, "gone.safetensors: no such file"),
        (["--lora", "ink:much"], 2, "argument --lora: 'ink:much': 'much' is not a scale"),
        (["--lora", "wide.safetensors"], 2, "LoRA for another model"),
        (["--lora", "old.ckpt"], 2, "is a pickled LoRA"),
        (["--lora", "cut.safetensors"], 4, "cut.safetensors"),
        (["--lora-dir", "nowhere"], 2, "--lora-dir nowhere: is not a folder"),
    ):
        found, errors = outcome(*arguments)
        assert (found, len(errors)) == (code, 1), errors
        assert says in errors[0]


NUMBERS = st.lists(st.integers(-1, 2**63), max_size=3)
ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "F4", ""]), "shape": NUMBERS, "data_offsets": NUMBERS}
)
HEADERS = st.dictionaries(st.sampled_from(["lora_unet_a.lora_down.weight", "a.alpha", "__metadata__", "x"]),
                          st.none() | st.integers() | ENTRIES, max_size=3)  # fmt: skip


def _file(header: dict[str, Any], rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


@settings(deadline=None, derandomize=True, max_examples=40, phases=[Phase.explicit, Phase.generate],
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(st.binary(max_size=64) | st.builds(_file, HEADERS, st.binary(max_size=16)))
@example(_file({"x": {"dtype": "F32", "shape": [], "data_offsets": []}}, b""))
def test_a_hostile_file_is_one_line(outcome: Outcome, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.safetensors").write_bytes(content)
    code, errors = outcome("--lora", "odd.safetensors")
    assert code in {2, 4}
    assert len(errors) == 1
    assert "defect" not in errors[0]


def test_a_picture_of_a_workflow_is_made_again_with_the_same_files(
    make_lora: MakeLora, tmp_path: Path, unloaded: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graph names the LoRA, and its record the digest, by which the file beside the picture is found."""
    monkeypatch.chdir(tmp_path)
    loras = (LoraUse(str(make_lora(tmp_path / "ink.safetensors")), 0.5),)
    asked = Request("a star", compat="comfyui", seed=1, width=64, height=64, loras=loras)
    picture = finish(unloaded.start(asked).run, 0, np.zeros((64, 64, 3), np.uint8))
    assert picture.graph is not None
    replace(picture, metadata={**picture.metadata, "workflow": True}).save(tmp_path / "star.png")
    arguments = repeated(["--from", "star.png"])
    work, _ = generate._work(generate._workflow(arguments), arguments, unloaded)
    (lora,) = work.runs[0].request.loras["base"]
    assert (lora.lora.path, lora.scale, lora.on("text_encoder")) == (Path("ink.safetensors"), 0.5, 0.5)
    make_lora(tmp_path / "ink.safetensors", seed=1)
    with pytest.raises(
        UsageError, match=r"was made with the LoRA 'ink.safetensors', which is not beside it as it was.*--lora-dir DIR$"
    ):
        repeated(["--from", "star.png"])


def test_the_plan_says_what_loras_change(
    make_lora: MakeLora, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_lora(tmp_path / "ink.safetensors", "unet", "text_encoder")
    options = ["--plan", "--vram", "8GB", "--lora-dir", str(tmp_path)]
    assert trt_generate([*options, "a star <lora:ink:0.5:0>", "--json"]) == 0
    changed = json.loads(capsys.readouterr().out)["changed_by_loras"]
    with safe_open(tmp_path / "ink.safetensors", "np") as file:
        ups, downs = (sorted(key for key in file.keys() if end in key) for end in (".lora_up", ".lora_down"))  # noqa: SIM118
        sizes = {up: file.get_tensor(up).shape[0] * file.get_tensor(down).shape[1] * 2
                 for up, down in zip(ups, downs, strict=True)}  # fmt: skip
    assert changed == {"text_encoder": sum(size for key, size in sizes.items() if "_te1_" in key)}
    assert trt_generate([*options, "--lora", "ink"]) == 0
    text = capsys.readouterr().out
    assert "LoRAs change unet: its plan is one for LoRAs" in text
    assert "ONNX Runtime" not in text
    assert trt_generate([*options, "--lora", "ink", "--provider", "ort-cuda"]) == 0
    assert "of unet, which ONNX Runtime holds a second time" in capsys.readouterr().out
    assert trt_generate([*options, "--lora", "gone"]) == 2
    assert "changed_by_loras" not in (trt_generate(["--plan", "--vram", "8GB", "--json"]), capsys.readouterr().out)[1]
