"""Text encoders of a stage: which one makes the pooled prompt, and prompts of equal length."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.bundle.manifest import Scheduler
from sdxl_trt.engines.errors import SourceError, UsageError
from sdxl_trt.export.components.text_encoders import find_pooled, open_tokenizers, without_idle_projection
from sdxl_trt.export.graph.models import MetaModel, build_model
from sdxl_trt.export.graph.signatures import make_graph
from sdxl_trt.export.optimum.configs import roles, tokenizer_roles
from sdxl_trt.export.sources.source import ModelSource, PipelineSource
from sdxl_trt.mini.embedded import bundle_path
from sdxl_trt.runtime.text.encoder import Prompt, PromptEncoder

PLAIN, PROJECTS = "CLIPTextModel", "CLIPTextModelWithProjection"


def _model(class_name: str, width: int = 8, positions: int = 77) -> MetaModel:
    config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "vocab_size": 600, "projection_dim": width, "max_position_embeddings": positions}  # fmt: skip
    return build_model(class_name, config, "test")


def _pipeline(models: dict[str, MetaModel], folder: Path = Path("root")) -> PipelineSource:
    sources = {
        name: ModelSource(f"root/{name}", name, type(model.module).__name__, dict(model.config), lambda: None)  # type: ignore[arg-type, return-value]
        for name, model in models.items()
    }
    roles = [name.replace("text_encoder", "tokenizer") for name in models]
    return PipelineSource(
        root=Path("root"), name="root", models=sources, tokenizers={role: folder / role for role in roles},
        scheduler=Scheduler(), requires_aesthetics_score=False, force_zeros_for_empty_prompt=True, index={},
        scheduler_config={},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("first", "expected"),
    [(None, "text_encoder_2"), ((PLAIN, 8), "text_encoder_2"), ((PROJECTS, 8), "text_encoder"),
     ((PROJECTS, 4), "text_encoder_2")],
)  # fmt: skip
def test_the_first_encoder_with_the_right_projection_makes_the_pooled_prompt(first: Any, expected: str) -> None:
    models = {} if first is None else {"text_encoder": _model(*first)}
    models["text_encoder_2"] = _model(PROJECTS)
    assert find_pooled(models, _pipeline(models)) == expected


@pytest.mark.parametrize(("first", "reason"), [(PLAIN, "not an SDXL model"), (PROJECTS, "is it swapped")])
def test_the_second_encoder_needs_a_projection(first: str, reason: str) -> None:
    models = {"text_encoder": _model(first), "text_encoder_2": _model(PLAIN)}
    with pytest.raises(SourceError, match=reason):
        find_pooled(models, _pipeline(models))


@pytest.fixture
def written(pairs: Any, tmp_path: Path) -> Path:
    """Two tokenizers: the first states 77 ids, the second states no length, so its encoder's positions count."""
    for role in ("tokenizer", "tokenizer_2"):
        shutil.copytree(pairs("outline").base / role, tmp_path / role)
    file = tmp_path / "tokenizer_2" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config))
    return tmp_path


def test_tokenizers_set_the_prompt_length_which_must_be_equal(written: Path) -> None:
    warned: list[str] = []
    models = {"text_encoder": _model(PLAIN, positions=248), "text_encoder_2": _model(PROJECTS)}
    loaded = open_tokenizers(models, _pipeline(models, written), warned.append)
    assert {role: tokenizer.max_length for role, tokenizer in loaded.items()} == {"tokenizer": 77, "tokenizer_2": 77}
    assert [text.split(":")[0] for text in warned] == ["root/text_encoder"]
    assert "has 248 positions, but its tokenizer cuts a prompt at 77 ids" in warned[0]
    models["text_encoder_2"] = _model(PROJECTS, positions=248)
    with pytest.raises(SourceError, match=r"different lengths \(tokenizer 77, tokenizer_2 248 ids\)"):
        open_tokenizers(models, _pipeline(models, written), warned.append)


def test_a_graph_reads_the_tokenizers_ids_up_to_its_positions() -> None:
    graph = make_graph("text_encoder", _model(PLAIN, positions=248), tokens=248, where="test")
    assert (graph.inputs[0].shape[1], graph.outputs[0].shape[1]) == (248, 248)
    with pytest.raises(SourceError, match="has 77 positions, but its tokenizer makes 248 ids"):
        make_graph("text_encoder", _model(PLAIN), tokens=248, where="test")


def test_an_unused_projection_is_removed() -> None:
    warned: list[str] = []
    models = {"text_encoder": _model(PROJECTS, 4), "text_encoder_2": _model(PROJECTS)}
    replaced = without_idle_projection(_pipeline(models), models, "text_encoder_2", warned.append)
    assert replaced.models["text_encoder"].class_name == PLAIN
    assert "text_projection.weight" not in models["text_encoder"].state
    assert len(warned) == 1


def test_bundles_that_comfyui_reads_differently_are_refused() -> None:
    manifest = read_bundle(bundle_path()).manifest
    first = manifest.components["text_encoder"]
    longer = msgspec.structs.replace(first, config=first.config | {"max_position_embeddings": 248})
    pooled_first = tuple(
        msgspec.structs.replace(encoder, pooled=not encoder.pooled) for encoder in manifest.base.text_encoders
    )
    base = msgspec.structs.replace(manifest.base, text_encoders=pooled_first)
    for changes, message in (
        ({"components": manifest.components | {"text_encoder": longer}}, "248 in ComfyUI"),
        ({"base": base}, "from its first encoder"),
    ):
        changed = msgspec.structs.replace(manifest, **changes)
        encoder = PromptEncoder(SimpleNamespace(bundle=SimpleNamespace(manifest=changed)))  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=message):
            encoder.encode([(changed.base, Prompt("a", "a"))], "unet", weighted=True)


def test_other_layouts_order_folders_like_the_encoders() -> None:
    stages = read_bundle(bundle_path()).manifest.stages()
    for name, suffixes in (("base", ["", "_2"]), ("refiner", ["_2"])):
        encoders = stages[name].text_encoders
        turned = tuple(msgspec.structs.replace(encoder, pooled=not encoder.pooled) for encoder in encoders)
        for stage in (stages[name], msgspec.structs.replace(stages[name], text_encoders=turned)):
            found = roles(stage), tokenizer_roles(stage)
            assert [found[0][f"text_encoder{suffix}"] for suffix in suffixes] == [e.component for e in encoders]
            assert [found[1][f"tokenizer{suffix}"] for suffix in suffixes] == [e.tokenizer for e in encoders]
