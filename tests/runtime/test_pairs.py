"""The table of pairs: complete, shown in the docs, and true of what a request resolves to. References draw the runs."""

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import sdxl_trt
from sdxl_trt.engines.bundle import read_bundle
from sdxl_trt.mini import bundle_path
from sdxl_trt.runtime.cli import series
from sdxl_trt.runtime.cli.generate import main as trt_generate
from sdxl_trt.runtime.pairs import FEATURES, PAIRS, SHARED, Outcome
from sdxl_trt.runtime.pipeline import batch as batches
from sdxl_trt.runtime.pipeline import chain

DOCS = Path(sdxl_trt.__file__).parent.parent / "docs" / "pairs.md"
SIDE = 64
OPTIONS: Mapping[str, list[str]] = {
    "LoRA": ["--lora", "ink.safetensors"],
    "mask": ["--mask", "mask.png"],
    "ControlNet": ["--control", "edges.png"],
    "embedding": ["--embedding-dir", "embeddings"],
    "tile": ["--tile"],
    "refine": ["--refine", "photo.png"],
    "sweep": ["--sweep", "guidance=2,6"],
    "batch": ["-n", "2"],
    "step cache": ["--cache", "2", "--steps", "20"],
}
"""What asks for a feature on the command line; a bundle has the others, and a workflow is a file of its own."""
IN_USE: Mapping[str, Callable[[list[Any]], bool]] = {
    "LoRA": lambda requests: all(each.loras["base"] for each in requests),
    "mask": lambda requests: all(each.masking is not None for each in requests),
    "ControlNet": lambda requests: all(len(each.controls) == 1 for each in requests),
    "embedding": lambda requests: all(len(each.embeddings) == 1 for each in requests),
    "tile": lambda requests: all(each.request.tile for each in requests),
    "refine": lambda requests: all(each.refiner_only for each in requests),
    "sweep": lambda requests: [each.request.guidance for each in requests] == [2, 6],
    "batch": lambda requests: all(len(each.seeds) == 2 for each in requests),
    "step cache": lambda requests: all(each.caches for each in requests),
}
ASKED = [pair for pair in PAIRS if set(pair) <= OPTIONS.keys() and set(pair) != {"LoRA", "ControlNet"}]
"""The bundle with toy ControlNets has no tables for LoRAs."""


def _matrix() -> str:
    """Return the table as the docs show it: a row and a column for each feature."""
    numbers = {outcome: number for number, outcome in enumerate(dict.fromkeys(PAIRS.values()), start=1)}
    names = [*FEATURES]
    lines = [f"| | {' | '.join(names[1:])} |", "|---" * len(names) + "|"]
    for row, name in enumerate(names[:-1]):
        cells = [str(numbers[PAIRS[name, other]]) if column > row else "" for column, other in enumerate(names)]
        lines.append(f"| {name} | {' | '.join(cells[1:])} |")
    return "\n".join(lines)


def _outcomes() -> str:
    outcomes = dict.fromkeys(PAIRS.values())
    told = [f"equal to {each.equal_to}" if each.equal_to else f"refused: “{each.refused}”" for each in outcomes]
    return "\n".join(f"{number}. {text}" for number, text in enumerate(told, start=1))


def _features() -> str:
    return "\n".join(
        ["| feature | what it is |", "|---|---|", *(f"| {name} | {FEATURES[name]} |" for name in FEATURES)]
    )


@pytest.mark.parametrize("part", [_matrix, _outcomes, _features])
def test_the_docs_have_the_table_of_the_code(part: Callable[[], str]) -> None:
    assert part() in DOCS.read_text(encoding="utf-8"), f"docs/pairs.md must contain this:\n{part()}"


def test_every_two_features_have_an_outcome() -> None:
    assert [*PAIRS] == [*combinations(FEATURES, 2)]


def test_an_outcome_is_one_of_two() -> None:
    for texts in ({}, {"equal_to": "a", "refused": "b"}):
        with pytest.raises(ValueError, match="either equal to something or refused"):
            Outcome(**texts)


def test_the_row_of_shared_calls_says_how_requests_share() -> None:
    assert all((SHARED in pair) == (outcome.sharing is not None) for pair, outcome in PAIRS.items())


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_lora: Callable[..., Path], controlled: Path) -> Path:
    """Make a folder of small files the current one."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    for name in ("photo", "edges", "mask"):
        Image.fromarray(pixels if name != "mask" else np.where(pixels[..., 0] > 99, 255, 0).astype(np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    make_lora(tmp_path / "ink.safetensors")
    components = read_bundle(controlled).manifest.components
    widths = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
    tensors = {key: np.ones((1, components[part].input("embeddings").shape[1]), np.float32)  # type: ignore[arg-type]
               for key, part in widths.items()}  # fmt: skip
    (tmp_path / "embeddings").mkdir()
    save_file(tensors, tmp_path / "embeddings" / "ink.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(pair: tuple[str, ...], bundle: Path) -> list[str]:
    """Return the arguments that ask for the features of `pair`."""
    prompt = "a star, embedding:ink" if "embedding" in pair else "a star"
    options = [option for feature in pair for option in OPTIONS[feature]]
    if "mask" in pair and "refine" not in pair:
        options += ["--image", "photo.png"]
    elif "refine" not in pair:
        options += ["--width", str(SIDE), "--height", str(SIDE)]
    return [
        prompt,
        "--engines",
        str(bundle),
        "--provider",
        "ort-cpu",
        "--steps",
        "4",
        "--seed",
        "1",
        "--json",
        *options,
    ]


@pytest.mark.parametrize("pair", ASKED, ids=" and ".join)
def test_both_features_are_used_or_refused(
    pair: tuple[str, str],
    files: Path,
    controlled: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[..., str],
) -> None:
    seen: list[Any] = []

    def steps(batch: batches.Batch) -> Any:
        seen[:] = [run.request for run in batch.runs]
        return iter(())

    monkeypatch.setattr(batches.Batch, "steps", steps)
    monkeypatch.setattr(series.Series, "finish", lambda *_, **__: {})
    if PAIRS[pair].refused:
        assert PAIRS[pair].refused in fails(trt_generate, command(pair, controlled), 2)
        return
    assert trt_generate(command(pair, controlled if "ControlNet" in pair else bundle_path())) == 0
    assert seen
    assert all(IN_USE[feature](seen) for feature in pair)


def test_a_picture_that_the_refiner_alone_changes_follows_no_controlnet(
    files: Path, controlled: Path, fails: Callable[..., str]
) -> None:
    """The last steps of a run are the refiner's, so little strength leaves the base none."""
    argv = [*command(("ControlNet",), controlled)[:-4], "--image", "photo.png", "--strength", "0.25"]
    line = fails(trt_generate, argv, 2)
    said = PAIRS["ControlNet", "refine"].refused
    assert line == f"error: --control edges.png: {said}; leave it out, or raise --strength, or give --no-refiner"


def test_tiles_beside_a_workflow_of_several_runs_are_those_of_both_autoencoders(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask in a workflow makes a chain, which encodes its picture itself."""
    tiles: list[Any] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, tile: tiles.append(tile) or function(*given, tile=tile)

    for name in ("encode_sample", "decode_latents"):
        monkeypatch.setattr(chain, name, watched(getattr(chain, name)))
    monkeypatch.setattr("sdxl_trt.runtime.vae.tile_sizes.TILE", SIDE // 2)
    base = ["--compat", "comfyui", "--steps", "1", "--no-refiner", "-o", "masked.png"]
    assert trt_generate([*command(("mask",), bundle_path()), *base]) == 0
    assert trt_generate(["--workflow", "masked.png", "--tile", "-o", "tiled.png", "--provider", "ort-cpu"]) == 0
    encoded, decoded = tiles
    assert encoded == decoded
    assert encoded is not None


def test_most_pairs_are_drawn() -> None:
    told = Counter(bool(outcome.refused) for outcome in PAIRS.values())
    assert told[True] == 5
