"""Base and refiner are told apart by what a folder holds, whatever class it was saved as."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.engines.errors import SourceError
from sdxl_trt.export.components.components import Options, plan_components, time_id_names
from sdxl_trt.export.sources.source import BASE_CLASS, REFINER_CLASS, open_source

Copy = Callable[..., Path]


@pytest.fixture
def copy(pairs: Callable[[str], Any], tmp_path: Path) -> Copy:
    """Return a function that copies an expert of a pair, with changes to its index."""

    def run(role: str, pair: str = "outline", **changes: Any) -> Path:
        root = tmp_path / role
        shutil.copytree(getattr(pairs(pair), role), root)
        index = json.loads((root / "model_index.json").read_bytes()) | changes
        (root / "model_index.json").write_text(json.dumps(index))
        return root

    return run


def test_a_base_that_an_image_to_image_pipeline_saved_is_a_base(copy: Copy) -> None:
    root = copy("base", _class_name=REFINER_CLASS, requires_aesthetics_score=False)
    source = open_source(root, "base")
    assert time_id_names(source)[-2:] == ("target_height", "target_width")
    plan_components(source, None, Options(), pytest.fail)
    with pytest.raises(SourceError, match=rf"is an SDXL base saved as {REFINER_CLASS}, which goes to --base"):
        open_source(root, "refiner")


def test_a_refiner_that_a_text_to_image_pipeline_saved_is_a_refiner_with_its_score(copy: Copy) -> None:
    root = copy("refiner", _class_name=BASE_CLASS)
    index = json.loads((root / "model_index.json").read_bytes())
    del index["requires_aesthetics_score"]  # that pipeline has none
    (root / "model_index.json").write_text(json.dumps(index))
    source = open_source(root, "refiner")
    assert source.requires_aesthetics_score
    assert time_id_names(source)[-1] == "aesthetic_score"
    with pytest.raises(SourceError, match=rf"is an SDXL refiner saved as {BASE_CLASS}, which goes to --refiner"):
        open_source(root, "base")


def test_a_refiner_without_a_score_is_one_by_its_class(copy: Copy) -> None:
    source = open_source(copy("refiner", "legacy"), "refiner")
    assert not source.requires_aesthetics_score


@pytest.mark.parametrize(
    "name", ["StableDiffusionXLInpaintPipeline", "StableDiffusionXLControlNetPipeline",
             "StableDiffusionXLInstructPix2PixPipeline"]
)  # fmt: skip
@pytest.mark.parametrize("role", ["base", "refiner"])
def test_other_pipelines_of_sdxl_are_refused_by_name(copy: Copy, name: str, role: Any) -> None:
    with pytest.raises(SourceError, match=rf"--{role} .*is a {name}, which is not supported; give the text-to-image"):
        open_source(copy(role, _class_name=name), role)
