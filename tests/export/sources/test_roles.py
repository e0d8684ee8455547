"""Base and refiner are distinguished by a folder's content, whatever class it was saved as."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.engines.errors import SourceError
from sdxl_trt.export.components import Options, plan_components, time_id_names
from sdxl_trt.export.sources.source import BASE_CLASS, REFINER_CLASS, open_source

Copy = Callable[..., Path]


@pytest.fixture
def copy(pairs: Callable[[str], Any], tmp_path: Path) -> Copy:
    """Return a function that copies a base or refiner, with changes to its index."""

    def run(role: str, pair: str = "outline", **changes: Any) -> Path:
        root = tmp_path / role
        shutil.copytree(getattr(pairs(pair), role), root)
        index = json.loads((root / "model_index.json").read_bytes()) | changes
        (root / "model_index.json").write_text(json.dumps(index))
        return root

    return run


def test_a_base_saved_by_an_image_to_image_pipeline_is_a_base(copy: Copy) -> None:
    root = copy("base", _class_name=REFINER_CLASS, requires_aesthetics_score=False)
    source = open_source(root, "base")
    assert time_id_names(source)[-2:] == ("target_height", "target_width")
    plan_components(source, None, Options(), pytest.fail)
    with pytest.raises(SourceError, match=rf"is an SDXL base saved as {REFINER_CLASS}, which goes to --base"):
        open_source(root, "refiner")


def test_a_refiner_saved_by_a_text_to_image_pipeline_is_a_refiner_with_a_score(copy: Copy) -> None:
    root = copy("refiner", _class_name=BASE_CLASS)
    index = json.loads((root / "model_index.json").read_bytes())
    del index["requires_aesthetics_score"]  # that pipeline has no score
    (root / "model_index.json").write_text(json.dumps(index))
    source = open_source(root, "refiner")
    assert source.requires_aesthetics_score
    assert time_id_names(source)[-1] == "aesthetic_score"
    with pytest.raises(SourceError, match=rf"is an SDXL refiner saved as {BASE_CLASS}, which goes to --refiner"):
        open_source(root, "base")


def test_the_class_identifies_a_refiner_without_a_score(copy: Copy) -> None:
    source = open_source(copy("refiner", "legacy"), "refiner")
    assert not source.requires_aesthetics_score


@pytest.mark.parametrize("role", ["base", "refiner"])
def test_an_inpainting_pipeline_is_what_it_holds(copy: Copy, role: Any) -> None:
    root = copy(role, _class_name="StableDiffusionXLInpaintPipeline")
    assert open_source(root, role).requires_aesthetics_score == (role == "refiner")
    other = "base" if role == "refiner" else "refiner"
    with pytest.raises(SourceError, match=f"goes to --{role}"):
        open_source(root, other)


@pytest.mark.parametrize(
    "name", ["StableDiffusionXLControlNetPipeline", "StableDiffusionXLInstructPix2PixPipeline"]
)  # fmt: skip
@pytest.mark.parametrize("role", ["base", "refiner"])
def test_other_pipelines_of_sdxl_are_refused_by_name(copy: Copy, name: str, role: Any) -> None:
    with pytest.raises(SourceError, match=rf"--{role} .*is a {name}, which is not supported; give the text-to-image"):
        open_source(copy(role, _class_name=name), role)
