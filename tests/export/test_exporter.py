"""Folders written by other tools, pairs that do not fit, precision, and the resulting manifest."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.errors import SourceError
from sdxl_trt.export import Options, export_bundle
from sdxl_trt.export.checkpoints.checkpoint import digest_tensors
from sdxl_trt.export.components import plan_components
from sdxl_trt.export.sources.source import BASE_CLASS, REFINER_CLASS, open_pipeline
from sdxl_trt.runtime import Request, open_bundle


def _plan(base: Path, refiner: Path | None = None) -> dict[str, Any]:
    lines: list[str] = []
    opened = open_pipeline(refiner, REFINER_CLASS) if refiner else None
    components, _ = plan_components(open_pipeline(base, BASE_CLASS), opened, Options(), lines.append)
    assert lines == []
    return components


def _digests(components: dict[str, Any]) -> dict[str, str]:
    return {name: digest_tensors(plan.checkpoint, plan.tensor_names()) for name, plan in components.items()}


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.slow
def test_a_folder_saved_in_shards_by_the_current_libraries_has_the_same_digests(
    pairs: Callable[[str], Any], tmp_path: Path
) -> None:
    from diffusers import StableDiffusionXLPipeline

    pair = pairs("outline")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionXLPipeline.from_pretrained(pair.base)
        pipeline.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    assert _digests(_plan(tmp_path)) == _digests(_plan(pair.base))


def test_ignored_settings_of_a_refiners_scheduler_cause_a_warning(pairs: Callable[[str], Any], tmp_path: Path) -> None:
    """The schedule is the base's; each UNet keeps its own prediction type."""
    pair = pairs("outline")
    folder = Path(shutil.copytree(pair.refiner, tmp_path / "refiner"))
    own = {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "_class_name": "HeunDiscreteScheduler"}
    _edit(folder / "scheduler" / "scheduler_config.json", **own)
    _edit(folder / "model_index.json", scheduler=["diffusers", "HeunDiscreteScheduler"])
    lines: list[str] = []
    plan_components(open_pipeline(pair.base, BASE_CLASS), open_pipeline(folder, REFINER_CLASS), Options(), lines.append)
    assert [line.removeprefix(f"{folder}: ") for line in lines] == [
        "the scheduler has timestep_spacing 'trailing', unlike the base's; both stages use the base's schedule",
        "HeunDiscreteScheduler means the sampler heun; the base's, euler, is used without --refiner-sampler heun",
    ]


@pytest.mark.slow
def test_old_autoencoder_names_are_the_same_tensors(pairs: Callable[[str], Any], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    pair = pairs("legacy")
    folder = Path(shutil.copytree(pair.base, tmp_path / "base"))
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    assert any(".proj_attn." in name for name in tensors)
    renames = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    current = {}
    for name, tensor in tensors.items():
        for old, new in renames.items():
            name = name.replace(old, new)  # noqa: PLW2901
        current[name] = tensor
    save_file(current, file)
    assert _digests(_plan(folder)) == _digests(_plan(pair.base))


@pytest.mark.slow
def test_one_changed_weight_makes_a_separate_component(pairs: Callable[[str], Any], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    pair = pairs("outline")
    assert set(_plan(pair.base, pair.refiner)) & {"refiner_text_encoder_2", "refiner_vae_decoder"} == set()
    refiner = Path(shutil.copytree(pair.refiner, tmp_path / "refiner"))
    file = refiner / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"] = np.nextafter(tensors["decoder.conv_out.bias"], np.float32(1))
    save_file(tensors, file)
    plans = _plan(pair.base, refiner)
    assert "refiner_vae_decoder" in plans
    assert "refiner_vae_encoder" not in plans


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("vae/config.json", {"latent_channels": 8}, "missing|shape|latent"),
        ("unet/config.json", {"in_channels": 9}, "inpainting|shape"),
        ("model_index.json", {"requires_aesthetics_score": False}, "requires_aesthetics_score"),
        ("model_index.json", {"unet": ["my_code", "UNet2DConditionModel"]}, "custom code"),
        ("model_index.json", {"unet": ["diffusers", "UNet3DConditionModel"]}, "not an SDXL component"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_tracing(
    file: str,
    changes: dict[str, Any],
    words: str,
    pairs: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sdxl_trt.export.exporter.convert_component", lambda name, *_: pytest.fail(f"{name} is traced"))
    pair = pairs("outline")
    refiner = Path(shutil.copytree(pair.refiner, tmp_path / "refiner"))
    _edit(refiner / file, **changes)
    with pytest.raises(Exception, match=words) as caught:
        export_bundle(pair.base, refiner, tmp_path / "out")
    assert caught.value.exit_code in (2, 4)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_refiner_of_another_latent_space_is_refused(pairs: Callable[[str], Any]) -> None:
    with pytest.raises(SourceError, match="another base"):
        _plan(pairs("outline").base, pairs("apart").refiner)


@pytest.mark.slow
@pytest.mark.usefixtures("converted_once")
def test_half_precision_keeps_conditions_and_autoencoder_in_fp32(pairs: Callable[[str], Any], tmp_path: Path) -> None:
    pair = pairs("outline")
    bundle = export_bundle(pair.base, None, tmp_path / "half", Options(precision="fp16"))
    unet, decoder = (bundle.manifest.components[name] for name in ("unet", "vae_decoder"))
    assert {spec.name: spec.dtype for spec in unet.inputs} == {
        "sample": "float16", "timestep": "float32", "encoder_hidden_states": "float16",
        "text_embeds": "float32", "time_ids": "float32",
    }  # fmt: skip
    assert decoder.precision == "fp32"  # its config sets force_upcast
    assert unet.weights.size < read_bundle(pair.bundle).manifest.components["unet"].weights.size * 0.6
    request = Request("a red fox", handoff=None, steps=6, seed=1, width=32, height=32)
    finals = []
    for root in (pair.bundle, bundle.root):
        with open_bundle(root) as pipeline:
            list(pipeline.generate(request))
            finals.append(pipeline.run.final)
    error = np.abs(finals[0] - finals[1]).max()
    assert 0 < error < 0.1  # really half precision, not fp32 under that name


@pytest.mark.slow
def test_the_manifest_records_what_was_exported(pairs: Callable[[str], Any]) -> None:
    manifest = read_bundle(pairs("outline").bundle).manifest
    unet = manifest.components["unet"]
    assert [list(spec.shape) for spec in unet.inputs] == [
        ["rows", 4, "height", "width"], ["rows"], ["rows", "tokens", 80], ["rows", 48], ["rows", 6],
    ]  # fmt: skip
    assert manifest.components["refiner_unet"].input("time_ids").shape == ("rows", 5)
    assert manifest.refiner.time_ids[-1] == "aesthetic_score"
    assert manifest.base.time_ids[-2:] == ("target_height", "target_width")
    assert (manifest.base.size_multiple, manifest.refiner.size_multiple) == (8, 16)
    assert manifest.base.scheduler.timestep_spacing == "leading"
    assert unet.opset == 23
    assert unet.source.class_name == "UNet2DConditionModel"
    assert "/" not in unet.source.name.removeprefix("base/")
