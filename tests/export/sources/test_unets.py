"""A UNet that replaces a base's: every layout, and errors that name other models."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdxl_trt.engines.errors import SourceError
from sdxl_trt.export.checkpoints.checkpoint import digest_tensors, open_checkpoint, resolve_names
from sdxl_trt.export.cli.export import main
from sdxl_trt.export.graph.models import build_model
from sdxl_trt.export.sources.source import BASE_CLASS, PipelineSource, open_pipeline, open_source, open_vae
from sdxl_trt.export.sources.unets import open_unet, with_unet

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def digest(made: Any) -> Callable[[PipelineSource], str]:
    """Return a function from a pipeline to the digest of its UNet, resolved without a warning."""
    config = json.loads((made("outline", "base")[0] / "unet" / "config.json").read_bytes())
    state = build_model("UNet2DConditionModel", config, "unet").state

    def run(source: PipelineSource) -> str:
        unet = source.models["unet"]
        return digest_tensors(resolve_names(unet.checkpoint(), state, unet.where, pytest.fail), state)

    return run


@pytest.fixture
def other(made: Any) -> tuple[Path, State, State]:
    """A base's folder, and another UNet for it with diffusers' and with LDM's names."""
    root, states, ldm = made("outline", "base")
    generator = torch.Generator().manual_seed(7)
    drawn = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in states["unet"].items()}
    back = {tensor.data_ptr(): name for name, tensor in ldm.items()}
    names = {name: back[tensor.data_ptr()].removeprefix("model.diffusion_model.") for name, tensor in
             states["unet"].items()}  # fmt: skip
    return root, drawn, {names[name]: tensor for name, tensor in drawn.items()}


@pytest.mark.parametrize(
    "layout", ["diffusers", "ldm", "ldm with prefix", "diffusers with prefix", "checkpoint", "folder", "pipeline"]
)
def test_a_unet_is_read_in_every_layout(
    made: Any, digest: Any, other: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, layout: str
) -> None:
    root, drawn, ldm = other
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in ldm.items()}
    files = {
        "diffusers": drawn, "ldm": ldm, "ldm with prefix": prefixed,
        "checkpoint": made("outline", "base")[2] | prefixed,
        "diffusers with prefix": {f"unet.{name}": tensor for name, tensor in drawn.items()},
    }  # fmt: skip
    path = tmp_path / "unet.safetensors"
    if layout in files:
        save_file(files[layout], path)
    else:
        path = tmp_path / ("unet" if layout == "folder" else "pipeline")
        shutil.copytree(root / "unet" if layout == "folder" else root, path)
        save_file(drawn, (path if layout == "folder" else path / "unet") / "diffusion_pytorch_model.safetensors")
    base = open_pipeline(root, BASE_CLASS)
    source = with_unet(base, open_unet(path, configs=root / "unet"))
    shutil.copytree(root / "unet", tmp_path / "wanted")
    save_file(drawn, tmp_path / "wanted" / "diffusion_pytorch_model.safetensors")
    unet = replace(base.models["unet"], open=partial(open_checkpoint, tmp_path / "wanted", "diffusion_pytorch_model"))
    assert digest(source) == digest(replace(base, models={"unet": unet})) != digest(base)
    assert {name: model for name, model in source.models.items() if name != "unet"} == {
        name: model for name, model in base.models.items() if name != "unet"
    }
    assert source.scheduler == base.scheduler
    assert re.fullmatch(r".*replaces the base's UNet, but the base's schedule stays; a distilled UNet .*", caplog.text,
                        re.DOTALL)  # fmt: skip
    assert len(caplog.records) == 1


def test_the_unets_prediction_type_is_used(
    digest: Any, other: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, drawn, _ = other
    save_file(drawn | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, tmp_path / "v.safetensors")
    source = with_unet(open_pipeline(root, BASE_CLASS), open_unet(tmp_path / "v.safetensors", configs=root / "unet"))
    assert (source.scheduler.prediction_type, source.scheduler.rescale_betas_zero_snr) == ("v_prediction", True)
    assert "this UNet has prediction_type v_prediction, rescale_betas_zero_snr True" in caplog.text
    digest(source)  # and the marker tensors cause no warning


def test_the_prediction_type_of_the_unets_pipeline_is_used(pairs: Callable[[str], Any]) -> None:
    base = open_pipeline(pairs("outline").base, BASE_CLASS)
    unet = open_unet(pairs("legacy").base)
    assert with_unet(base, unet).scheduler.prediction_type == "v_prediction"
    back = with_unet(open_pipeline(pairs("legacy").base, BASE_CLASS), open_unet(pairs("outline").base))
    assert back.scheduler.prediction_type == "epsilon"


@pytest.mark.parametrize("scheduler", ["EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_unet_of_another_kind_of_schedule_is_refused(other: Any, tmp_path: Path, scheduler: str) -> None:
    shutil.copytree(other[0], tmp_path / "edm")
    (tmp_path / "edm" / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": scheduler}))
    with pytest.raises(SourceError, match=rf"its scheduler is a {scheduler}.*give the whole pipeline with --base"):
        open_unet(tmp_path / "edm")


B = torch.zeros(4, 4, 3, 3)
WIDE = {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.zeros(2, 2048),
        "add_embedding.linear_1.weight": torch.zeros(4, 2816)}  # fmt: skip
KEY = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
FOREIGN: list[tuple[str, State, str]] = [
    ("SD1", {"input_blocks.0.0.weight": B, KEY: torch.zeros(2, 768)}, "is a UNet of Stable Diffusion 1; --unet takes"),
    ("SD2", {"model.diffusion_model.input_blocks.0.0.weight": B,
             f"model.diffusion_model.{KEY}": torch.zeros(2, 1024)}, "is a UNet of Stable Diffusion 2"),
    ("refiner", {"input_blocks.0.0.weight": B, KEY: torch.zeros(2, 1280), "label_emb.0.0.weight": B + 0},
     "is the refiner's UNet"),
    ("edit", WIDE | {"conv_in.weight": torch.zeros(4, 8, 3, 3)}, r"is an edit model \(its UNet takes 8"),
    ("LCM", WIDE | {"time_embedding.cond_proj.weight": B}, "is a latent consistency model"),
    ("ControlNet", WIDE | {"controlnet_cond_embedding.conv_in.weight": B}, "is a ControlNet, which is not supported"),
    ("LoRA", {"lora_unet_down_blocks_1_attentions_0_proj_in.lora_up.weight": B}, "is a LoRA, which goes to --lora"),
    ("autoencoder", {"decoder.conv_in.weight": B}, "is an autoencoder, which goes to --vae"),
    ("DiT", {"double_blocks.0.img_attn.norm.key_norm.scale": B}, "is a diffusion transformer"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "message"), [case[1:] for case in FOREIGN], ids=[case[0] for case in FOREIGN])
def test_another_models_unet_is_named_in_the_error(tmp_path: Path, tensors: State, message: str) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=rf"--unet .*x\.safetensors: {message}"):
        open_unet(tmp_path / "x.safetensors")


SDXL = {"addition_embed_type": "text_time", "cross_attention_dim": 2048}


@pytest.mark.parametrize(
    ("config", "message"),
    [({"_class_name": "ControlNetModel"}, "is a ControlNetModel; --unet takes a UNet2DConditionModel"),
     ({"cross_attention_dim": 768}, "is a UNet of Stable Diffusion 1"),
     (SDXL | {"cross_attention_dim": 1280}, "is the refiner's UNet"),
     (SDXL | {"in_channels": 8}, "is an edit model"),
     (SDXL | {"time_cond_proj_dim": 256}, "is a latent consistency model"),
     ({"addition_embed_type": "image"}, "a UNet of another model than SDXL"), (None, "has no config.json")],
)  # fmt: skip
def test_another_models_folder_is_named_in_the_error(
    tmp_path: Path, config: dict[str, Any] | None, message: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=f"--unet .*{message}"):
        open_unet(tmp_path)


def test_the_error_for_a_lone_unet_names_its_option(tmp_path: Path) -> None:
    save_file({"down_blocks.0.resnets.0.conv1.weight": B}, tmp_path / "x.safetensors")
    for opened in (
        lambda: open_source(tmp_path / "x.safetensors", "base"),
        lambda: open_vae(tmp_path / "x.safetensors"),
    ):
        with pytest.raises(SourceError, match="is a UNet without its encoders, which goes to --unet"):
            opened()


def test_the_command_accepts_a_unet(
    other: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, drawn, _ = other
    shutil.copytree(root / "unet", tmp_path / "lightning")
    save_file(drawn, tmp_path / "lightning" / "diffusion_pytorch_model.safetensors")
    arguments = ["--base", str(root), "--no-refiner", "--unet", str(tmp_path / "lightning"), "--out", "x", "--dry-run"]
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert "replaces the base's UNet" in captured.err
    assert "unet" in json.loads(captured.out)["components"]


def test_the_command_requires_a_base(fails: Callable[..., str]) -> None:
    assert "--unet x without --base: name the base" in fails(main, ["--unet", "x"], 2)
