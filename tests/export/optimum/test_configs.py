"""The files beside the graphs, against transformers' tokenizers and the source's diffusers folders."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.bundle.manifest import Manifest, Tokenizer
from sdxl_trt.engines.bundle.records import FileRecord
from sdxl_trt.engines.errors import CorruptError
from sdxl_trt.export.optimum.configs import component_config, model_index, scheduler_config, tokenizer_files
from sdxl_trt.export.sources.source import BASE_CLASS, open_pipeline
from sdxl_trt.export.sources.tokenizers import LoadedTokenizer, load_tokenizer

PROMPTS = ["a red fox in the snow", "", "Blurry, BLUE  star!", "naïve café 雪 <|endoftext|> fox", "a " * 90]


def _record(loaded: LoadedTokenizer) -> Tokenizer:
    file = FileRecord(file="kept.json", size=len(loaded.json), sha256="0" * 64)
    ids = {"bos_id": loaded.bos_id, "eos_id": loaded.eos_id, "pad_id": loaded.pad_id}
    return Tokenizer(file=file, max_length=loaded.max_length, **ids)


def _written(source: Path, folder: Path) -> Path:
    """Write the tokenizer of `source` as an export and then the optimum layout write it."""
    loaded = load_tokenizer(source)
    kept = folder.with_name(f"{folder.name}.json")
    kept.write_bytes(loaded.json)
    folder.mkdir()
    for name, text in tokenizer_files(kept, _record(loaded)).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def _ids(folder: Path) -> list[list[int]]:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return list(tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True).input_ids)


@pytest.mark.parametrize("role", ["tokenizer", "tokenizer_2"])
def test_tokenizers_make_the_same_ids_as_the_source(pairs: Callable[[str], Any], role: str, tmp_path: Path) -> None:
    source = pairs("outline").base / role
    written = _written(source, tmp_path / role)
    assert {path.name for path in written.iterdir()} == {path.name for path in source.iterdir()}
    assert _ids(written) == _ids(source)


def test_a_tokenizer_saved_by_current_transformers_with_a_token_of_its_own(
    pairs: Callable[[str], Any], tmp_path: Path
) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(pairs("outline").base / "tokenizer")
    tokenizer.add_tokens(["<my-fox>"])
    tokenizer.save_pretrained(tmp_path / "saved")
    written = _written(tmp_path / "saved", tmp_path / "written")
    assert json.loads((written / "added_tokens.json").read_text()).keys() == {"<my-fox>"}
    assert _ids(written) == _ids(tmp_path / "saved")


def test_a_file_that_is_not_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": {"type": "WordLevel"}, "added_tokens": []}')
    record = _record(LoadedTokenizer(b"", 77, 0, 1, 1))
    with pytest.raises(CorruptError, match="not a CLIP tokenizer"):
        tokenizer_files(path, record)


def test_the_whole_scheduler_config_is_written(pairs: Callable[[str], Any]) -> None:
    source = open_pipeline(pairs("legacy").base, BASE_CLASS)
    published = {"clip_sample": False, "timestep_spacing": "trailing"}
    assert scheduler_config(replace(source, scheduler_config=published)) == {
        "_class_name": "EulerDiscreteScheduler",
        **published,
    }
    stored = json.loads((source.root / "scheduler/scheduler_config.json").read_text())
    assert scheduler_config(source) == stored


def _manifest(pairs: Callable[[str], Any], name: str) -> Manifest:
    return read_bundle(pairs(name).bundle).manifest


def test_settings_with_the_bases_default_are_explicit(pairs: Callable[[str], Any]) -> None:
    scheduler = {"_class_name": "EulerDiscreteScheduler"}
    for name in ("outline", "apart", "legacy"):
        manifest, source = _manifest(pairs, name), pairs(name)
        for stage, root in (("base", source.base), ("refiner", source.refiner)):
            expected = json.loads((root / "model_index.json").read_text())
            made = model_index(stage, manifest, scheduler)
            assert {key: made[key] for key in expected if key != "_diffusers_version"} == {
                key: value for key, value in expected.items() if key != "_diffusers_version"
            }


def test_configs_have_the_entries_that_optimum_reads(pairs: Callable[[str], Any]) -> None:
    manifest = _manifest(pairs, "apart")
    stage, components = manifest.stages()["refiner"], manifest.components
    unet = msgspec.structs.replace(components["refiner_unet"], config={"in_channels": 4})
    assert component_config("unet", unet, stage) == {"in_channels": 4, "sample_size": 16, "time_cond_proj_dim": None}
    encoder = msgspec.structs.replace(components["refiner_text_encoder_2"], config={})
    expected = {"num_hidden_layers": 3, "projection_dim": 64}
    assert component_config("text_encoder_2", encoder, stage) == expected
    single = msgspec.structs.replace(components["refiner_vae_decoder"], config={"force_upcast": True})
    decoder = component_config("vae_decoder", single, stage)
    assert (decoder["force_upcast"], decoder["scaling_factor"]) == (True, 0.2)
    half = msgspec.structs.replace(single, precision="fp16")
    assert component_config("vae_decoder", half, stage)["force_upcast"] is False
