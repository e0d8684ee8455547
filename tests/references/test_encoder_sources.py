"""Text encoders that differ from SDXL's, exported and run, against diffusers on the same folders."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.errors import SourceError, UsageError
from sdxl_trt.export import Options, export_bundle
from sdxl_trt.runtime import Request, open_bundle

SHORT, LONG = "a red fox in the snow", "a red fox, " * 60
# UNet and autoencoder are the same in all tests: they are converted once.
pytestmark = pytest.mark.usefixtures("converted_once")

LATENTS_TOLERANCE = 1e-4
Copy = Callable[[str], Path]


@pytest.fixture
def base(pairs: Any, tmp_path: Path) -> Path:
    """A copy of a pair's base, for tests to change."""
    return Path(shutil.copytree(pairs("outline").base, tmp_path / "base"))


def _save_encoder(folder: Path, class_name: str, **changes: Any) -> None:
    """Write an encoder with random weights whose config is that of `folder`, with changes."""
    import torch
    import transformers

    config = transformers.CLIPTextConfig.from_pretrained(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(11)
    getattr(transformers, class_name)(config).save_pretrained(folder)


def _say(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _export(base: Path) -> Bundle:
    return export_bundle(base, None, base.with_name("bundle"), Options(precision="fp32"))


def _ours(bundle: Bundle, prompt: str, negative: str | None, **settings: Any) -> np.ndarray:
    with open_bundle(bundle.root, provider="ort-cpu") as pipeline:
        request = Request(prompt, negative=negative, steps=6, seed=7, width=32, height=32, **settings)
        (run,) = [step.picture for step in pipeline.steps(request) if step.picture is not None]
        return np.asarray(run.latents)


def _diffusers(base: Path, prompt: str, negative: str | None, **parts: Any) -> np.ndarray:
    import torch
    from diffusers import StableDiffusionXLPipeline

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionXLPipeline.from_pretrained(base, **parts)
        pipeline.set_progress_bar_config(disable=True)
        latents = pipeline(
            prompt, negative_prompt=negative, num_inference_steps=6, guidance_scale=5.0, width=32, height=32,
            generator=[torch.Generator().manual_seed(7)], output_type="latent",
        ).images  # fmt: skip
    return np.asarray(latents)


def _assert_same(ours: np.ndarray, reference: np.ndarray, what: str) -> None:
    error = float(np.abs(ours - reference).max() / np.abs(reference).max())
    print(f"{what}: {error:.1e} of the largest latent")
    assert error <= LATENTS_TOLERANCE, f"{what}: {error:.2e}, at most {LATENTS_TOLERANCE:g}"


def test_long_clip_encoders_run_as_in_diffusers(base: Path) -> None:
    for suffix, class_name in (("", "CLIPTextModel"), ("_2", "CLIPTextModelWithProjection")):
        _save_encoder(base / f"text_encoder{suffix}", class_name, max_position_embeddings=248)
        _say(base / f"tokenizer{suffix}" / "tokenizer_config.json", model_max_length=248)
    bundle = _export(base)
    assert bundle.manifest.components["text_encoder"].input("input_ids").shape == ("prompts", 248)
    for prompt, negative in ((SHORT, None), (SHORT, "blurry"), (LONG, "")):
        name = f"{len(prompt)} characters, negative {negative!r}"
        _assert_same(_ours(bundle, prompt, negative), _diffusers(base, prompt, negative), name)


def test_long_clip_encoders_with_usual_tokenizers(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    for suffix, class_name in (("", "CLIPTextModel"), ("_2", "CLIPTextModelWithProjection")):
        _save_encoder(base / f"text_encoder{suffix}", class_name, max_position_embeddings=248)
    bundle = _export(base)
    assert caplog.text.count("its tokenizer cuts a prompt at 77 ids") == 2
    _assert_same(_ours(bundle, LONG, ""), _diffusers(base, LONG, ""), "248 positions, 77 ids")
    with pytest.raises(UsageError, match="reads 77 tokens here, but 248 in ComfyUI"):
        _ours(bundle, SHORT, "", compat="comfyui")


def test_one_long_clip_encoder_is_refused_where_diffusers_fails(base: Path) -> None:
    _save_encoder(base / "text_encoder", "CLIPTextModel", max_position_embeddings=248)
    _say(base / "tokenizer" / "tokenizer_config.json", model_max_length=248)
    with pytest.raises(SourceError, match=r"different lengths \(tokenizer 248, tokenizer_2 77 ids\)"):
        _export(base)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        _diffusers(base, SHORT, None)


def _project_first(base: Path, width: int) -> None:
    _save_encoder(base / "text_encoder", "CLIPTextModelWithProjection", projection_dim=width)
    _say(base / "model_index.json", text_encoder=["transformers", "CLIPTextModelWithProjection"])


def test_a_first_encoder_that_projects_to_the_same_width_pools(base: Path) -> None:
    second = json.loads((base / "text_encoder_2" / "config.json").read_text())
    _project_first(base, second["projection_dim"])
    bundle = _export(base)
    assert [encoder.pooled for encoder in bundle.manifest.base.text_encoders] == [True, False]
    for negative in (None, "blurry"):
        _assert_same(_ours(bundle, SHORT, negative), _diffusers(base, SHORT, negative), f"pooled first, {negative!r}")
    with pytest.raises(UsageError, match="pooled prompt from its first encoder"):
        _ours(bundle, SHORT, "", compat="comfyui")


def test_a_projection_that_does_not_fit_is_left_out(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    import transformers

    _project_first(base, 40)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        _diffusers(base, SHORT, None)
    bundle = _export(base)
    assert "using the first encoder as a CLIPTextModel" in caplog.text
    assert [encoder.pooled for encoder in bundle.manifest.base.text_encoders] == [False, True]
    assert not any(spec.name == "text_embeds" for spec in bundle.manifest.components["text_encoder"].outputs)
    plain = transformers.CLIPTextModel.from_pretrained(base / "text_encoder")
    reference = _diffusers(base, SHORT, "blurry", text_encoder=plain)
    _assert_same(_ours(bundle, SHORT, "blurry"), reference, "its first encoder as a CLIPTextModel")


def test_a_folder_without_an_autoencoder_takes_another(base: Path, pairs: Any) -> None:
    other = pairs("outline").base / "vae"
    shutil.rmtree(base / "vae")
    _say(base / "model_index.json", vae=[None, None])
    out = base.with_name("bundle")
    export_bundle(base, None, out, Options(precision="fp32", vae=other))
    whole = export_bundle(pairs("outline").base, None, base.with_name("whole"), Options(precision="fp32"))
    assert read_bundle(out).manifest.components["vae_decoder"].key == whole.manifest.components["vae_decoder"].key
    with pytest.raises(SourceError, match="has no vae; give an autoencoder with --vae"):
        export_bundle(base, None, out, Options(precision="fp32"))
