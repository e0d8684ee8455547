"""The small pair that ComfyUI ran: its checkpoints, its conditioning and whole workflows (tests/comfyui)."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.benchmarks.full_size.architectures import ROLES, Role, architecture
from sdxl_trt.benchmarks.full_size.checkpoints import write_checkpoint
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.export import Options, export_bundle
from sdxl_trt.runtime import open_bundle
from sdxl_trt.runtime.comfyui.reader import read_workflow
from sdxl_trt.runtime.comfyui.requests import check_workflow, pair_request
from sdxl_trt.runtime.pipeline.pipeline import Pipeline
from sdxl_trt.runtime.text.encoder import Prompt

RECORDED = Path(__file__).parents[1] / "comfyui"
SHA256 = {
    "base": "5e29ef98fdec77c8e7ef5557c0299334cc643d17fbb6a72d6148a5f7e1caaac0",
    "refiner": "9d28bc23580980bf40253ebdfab52abeca81e27032ab833e571bc06159abfc5c",
}
REQUIRED = 1.5e-5
"""Relative to the spread: ONNX Runtime and torch sum in different orders."""
PROMPTS: list[dict[str, Any]] = json.loads((RECORDED / "prompts.json").read_bytes())
WORKFLOWS = sorted(path.stem for path in (RECORDED / "workflows").glob("*.json"))


def _write_configs(root: Path, role: Role) -> None:
    """Write a diffusers folder without weights: the configs that a single file of this size lacks."""
    from sdxl_trt.export.sources.tokenizers import tokenizer_files

    shape = architecture("h6", role)
    files = {f"{model}/config.json": config for model, config in shape.models.items()}
    files |= {"scheduler/scheduler_config.json": shape.scheduler, "model_index.json": shape.index}
    contents = {name: json.dumps(config).encode() for name, config in files.items()}
    for name, source in shape.tokenizers.items():
        contents |= {f"{name}/{file}": content for file, content in tokenizer_files(source).items()}
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


@pytest.fixture(scope="module")
def digests() -> dict[str, str]:
    """The digests of both checkpoints, once `pipeline` has written them."""
    return {}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, digests: dict[str, str]) -> Iterator[Pipeline]:
    root = tmp_path_factory.mktemp("h6")
    files = {role: write_checkpoint("h6", role, root, kind="single-file", dtype="fp32") for role in ROLES}
    for role, path in files.items():
        with path.open("rb") as file:
            digests[role] = hashlib.file_digest(file, "sha256").hexdigest()
        _write_configs(root / "configs" / role, role)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdxl_trt.export.sources.source.PUBLISHED", root / "configs")
        export_bundle(files["base"], files["refiner"], root / "bundle", Options(precision="fp32"))
    for path in files.values():
        path.unlink()
    with open_bundle(root / "bundle", provider="ort-cpu", residency="resident") as opened:
        yield opened


def _off(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / (expected.std() or 1.0))


def test_the_checkpoints_are_those_of_the_recipe(pipeline: Pipeline, digests: dict[str, str]) -> None:
    assert pipeline.manifest.refiner is not None
    assert digests == SHA256


def test_conditioning_is_comfyuis(pipeline: Pipeline) -> None:
    measured = []
    with np.load(RECORDED / "conditioning.npz") as recorded:
        for case in PROMPTS:
            prompt = Prompt(case.get("text_l", case.get("text")), case.get("text_g", case.get("text")))
            for role, stage in pipeline.manifest.stages().items():
                name = f"{case['name']}_{role}"
                if name not in recorded:
                    continue
                if not np.isfinite(recorded[name]).all():
                    with pytest.raises(UsageError, match="choose -10000 to 10000"):
                        pipeline._encoder.encode([(stage, prompt)], stage.unet, weighted=True)
                    continue
                (found,) = pipeline._encoder.encode([(stage, prompt)], stage.unet, weighted=True)
                measured.append((_off(found.hidden[:, ::32], recorded[name]), name))
                measured.append((_off(found.pooled, recorded[f"{name}_pooled"]), name))
    assert len(measured) > 200
    assert [pair for pair in measured if pair[0] > REQUIRED] == []


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflows_latents_are_comfyuis(pipeline: Pipeline, name: str) -> None:
    """Compared after every sampler node."""
    workflow = read_workflow(RECORDED / "workflows" / f"{name}.json")
    request = pair_request(workflow, pipeline.manifest, check_workflow(workflow, pipeline.manifest))
    assert request is not None
    job = pipeline.start(request)
    list(pipeline.encode([job]))
    list(pipeline.base(job))
    found = [job.latents.copy()]
    if job.run.request.uses_refiner:
        list(pipeline.refine(job))
        found.append(job.latents)
    with np.load(RECORDED / "workflows" / f"{name}.npz") as recorded:
        assert len(found) == len(recorded.files) == len(workflow.samplings)
        off = [_off(latents, recorded[each.node]) for latents, each in zip(found, workflow.samplings, strict=True)]
    assert max(off) <= REQUIRED, off
