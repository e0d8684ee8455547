"""The tutorial's commands, unchanged, on a small pair: their steps, their warnings and their files' metadata."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_trt.runtime.cli.generate import main as trt_generate
from sdxl_trt.runtime.cli.repeat import repeated
from sdxl_trt.runtime.comfyui.reader import read_workflow
from sdxl_trt.runtime.comfyui.workflow import TO_THE_END

DOCUMENT = Path(__file__).parent.parent / "docs" / "tutorial.md"

Report = dict[str, Any]


def _commands() -> dict[str, list[str]]:
    """Return the arguments of every command in the document, by the file it writes."""
    found, variables = {}, {}
    for block in re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(), re.DOTALL):
        for line in block.splitlines():
            first, *words = shlex.split(line)
            if name := re.fullmatch(r"([A-Z]+)=(.*)", first):
                variables[f"${name[1]}"] = name[2]
                continue
            assert first == "trt-generate"
            arguments = [variables.get(word, word) for word in words]
            found[arguments[arguments.index("-o") + 1]] = arguments
    return found


@pytest.fixture(scope="module")
def run(pairs: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """Return a function that runs one of the commands with the small pair, after drawing the tutorial's picture."""
    folder = tmp_path_factory.mktemp("tutorial")
    commands = _commands()

    def generate(name: str) -> int:
        arguments = commands[name]
        arguments[arguments.index("--engines") + 1] = str(pairs("outline").bundle)
        if not {"--workflow", "--from"} & set(arguments):
            arguments = [*arguments, "--width", "32", "--height", "32"]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            return trt_generate([*arguments, "--json"])

    assert generate("tutorial.png") == 0
    generate.folder = folder  # type: ignore[attr-defined]
    return generate


@pytest.fixture
def reported(run: Any, capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[Report, str]]:
    """Return a function that runs a command and returns its report and stderr."""

    def report(name: str) -> tuple[Report, str]:
        capsys.readouterr()
        assert run(name) == 0
        captured = capsys.readouterr()
        return json.loads(captured.out), captured.err

    return report


def _steps(report: Report) -> tuple[int, int]:
    timings = report["timings"]
    return len(timings["base"]["steps"]), len(timings["refiner"]["steps"])


def _pixels(folder: Path, name: str) -> Any:
    with Image.open(folder / name) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.slow
def test_the_picture_contains_the_tutorial_s_graph(run: Any) -> None:
    base, refiner = read_workflow(run.folder / "tutorial.png").samplings
    assert (base.steps, base.cfg, base.sampler, base.schedule, base.seed) == (50, 8.0, "euler", "normal", 0)
    assert (base.add_noise, base.start, base.end, base.leftover_noise) == (True, 0, 40, True)
    assert (refiner.add_noise, refiner.start, refiner.end, refiner.leftover_noise) == (False, 40, TO_THE_END, False)
    (positive,), (negative,), (refined,) = base.positive, base.negative, refiner.positive
    assert refined.score == refiner.negative[0].score == 6.0
    assert positive.text_l == positive.text_g == refined.text_g
    assert positive.text_g.endswith("16k resolution")
    assert negative.text_g.startswith("(worst quality")


@pytest.mark.slow
def test_a_handoff_sweep_of_a_workflow_runs_the_base_once(
    reported: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, said = reported("cuts.png")
    assert _steps(report) == (50, 38 + 25 + 20 + 17 + 15 + 10)
    assert "warning" not in said
    assert [image["sweep"]["handoff-step"] for image in report["images"]] == [12, 25, 30, 33, 35, 40, None]
    assert np.array_equal(_pixels(run.folder, "cuts-5.png"), _pixels(run.folder, "tutorial.png"))
    cells = [_pixels(run.folder, f"cuts-{k}.png") for k in range(7)]
    assert not any(np.array_equal(cells[k], cells[k + 1]) for k in range(6))
    graph = read_workflow(run.folder / "cuts-6.png")
    assert [sampling.end for sampling in graph.samplings] == [TO_THE_END]

    monkeypatch.chdir(run.folder)
    again = repeated(_commands()["other-seed.png"])
    assert (again.workflow, again.seed) == (Path("cuts.png"), 1)
    assert again.sweep == ["handoff-step=12,25,30,33,35,40,none"]
    assert len(read_workflow(run.folder / "cuts.png").samplings) == 2


@pytest.mark.slow
def test_an_aesthetic_score_sweep_of_a_workflow_runs_the_base_once(reported: Any, run: Any) -> None:
    report, _ = reported("scores.png")
    assert _steps(report) == (40, 30)
    assert np.array_equal(_pixels(run.folder, "scores-1.png"), _pixels(run.folder, "tutorial.png"))
    assert not np.array_equal(_pixels(run.folder, "scores-0.png"), _pixels(run.folder, "scores-2.png"))


@pytest.mark.slow
def test_the_misfit_warnings_are_those_in_the_document(reported: Any) -> None:
    _, said = reported("misfit.png")
    (expected,) = re.findall(r"```\n(warning: .*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert [line for line in said.splitlines() if line.startswith("warning:")] == expected.splitlines()


def test_the_other_commands_have_the_same_handoffs_and_scores() -> None:
    commands = _commands()
    assert set(commands) == {
        "tutorial.png", "cuts.png", "cuts-too.png", "scores.png", "grid.png", "other-seed.png", "misfit.png",
    }  # fmt: skip
    assert "handoff-step=12,25,30,33,35,40,none" in commands["cuts-too.png"]
    assert [word for word in commands["grid.png"] if "=" in word] == ["aesthetic-score=4,6,8", "handoff-step=25,35,40"]
