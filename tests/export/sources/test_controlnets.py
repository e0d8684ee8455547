"""A ControlNet in every layout, and other control models, which are refused by name."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdxl_trt.engines.errors import SourceError
from sdxl_trt.export.checkpoints.checkpoint import digest_tensors, resolve_names
from sdxl_trt.export.graph.models import build_model
from sdxl_trt.export.sources.controlnets import open_controlnet
from sdxl_trt.export.sources.hub import Snapshot

State = dict[str, torch.Tensor]
# ControlNet's own names, written for this test, independently of export/checkpoints/ldm.py; one layer a level.
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "controlnet_mid_block": "middle_block_out.0", "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
}  # fmt: skip


def _ldm_name(name: str) -> str:
    def block(match: re.Match[str]) -> str:
        number = 2 * int(match[1]) + 1 + (match[2] == "downsamplers")
        if match[2] == "downsamplers":
            return f"input_blocks.{number}.0.op."
        return f"input_blocks.{number}.{int(match[2] == 'attentions')}."

    module, _, parameter = name.rpartition(".")
    if module in _ENDS:
        return f"{_ENDS[module]}.{parameter}"
    name = re.sub(r"^controlnet_down_blocks\.(\d+)\.", r"zero_convs.\1.0.", name)
    name = re.sub(r"^controlnet_cond_embedding\.blocks\.(\d+)", lambda m: f"input_hint_block.{2 * int(m[1]) + 2}", name)
    name = re.sub(
        r"^down_blocks\.(\d)\.(resnets|attentions|downsamplers)\.0\.(conv\.)?(?=weight|bias|[a-z])", block, name
    )
    name = re.sub(r"^mid_block\.resnets\.(\d)\.", lambda m: f"middle_block.{2 * int(m[1])}.", name)
    name = name.replace("mid_block.attentions.0.", "middle_block.1.")
    if re.match(r"input_blocks\.\d+\.0\.|middle_block\.[02]\.", name):
        for ours, theirs in _RESNET.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    return name


@pytest.fixture(scope="module")
def net(made: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, State]:
    """Return the folder of a base's UNet, that of a ControlNet for it, and the ControlNet's tensors."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = made("outline", "base")[0] / "unet"
    model = ControlNetModel.from_unet(
        UNet2DConditionModel.from_pretrained(unet), conditioning_embedding_out_channels=(16, 32)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # no two tensors are equal
    folder = tmp_path_factory.mktemp("net") / "canny"
    model.save_pretrained(folder)
    return unet, folder, dict(model.state_dict())


def _digest(source: Any) -> str:
    state = build_model("ControlNetModel", source.model.config, source.model.where).state
    return digest_tensors(resolve_names(source.model.checkpoint(), state, "net", pytest.fail), state)


@pytest.mark.parametrize("layout", ["diffusers", "ldm", "control_model"])
def test_a_file_in_every_layout_equals_the_folder(net: Any, tmp_path: Path, layout: str) -> None:
    unet, folder, state = net
    path = tmp_path / "canny.safetensors"
    prefix = "control_model." if layout == "control_model" else ""
    save_file({prefix + (name if layout == "diffusers" else _ldm_name(name)): tensor for name, tensor in state.items()},
              path)  # fmt: skip
    file, whole = open_controlnet(path, configs=unet), open_controlnet(folder)
    assert (file.name, whole.name) == ("canny", "canny")
    assert _digest(file) == _digest(whole)


def test_a_repository_gives_its_name_without_owner_and_commit(
    net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(net[1], tmp_path / "0123abc"))
    found = Snapshot(folder, "owner/canny@0123abc", "")
    monkeypatch.setattr("sdxl_trt.export.sources.controlnets.fetch_controlnet", lambda hub_id, *, half: found)
    source = open_controlnet("owner/canny")
    assert (source.name, source.model.name) == ("canny", "owner/canny@0123abc")
    local = Path(shutil.copytree(net[1], tmp_path / "canny@2"))
    assert open_controlnet(local).name == "canny@2"


def _config(folder: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "ControlNetUnionModel"}, "is a union ControlNet; --controlnet takes a ControlNet of SDXL"),
        ({"_class_name": "T2IAdapter"}, "is a T2I adapter"),
        ({"_class_name": "UNet2DConditionModel"}, "is a UNet;"),
        ({"_class_name": "FluxControlNetModel"}, "is a FluxControlNetModel"),
        ({"cross_attention_dim": 768, "addition_embed_type": None}, "is a ControlNet of Stable Diffusion 1"),
        ({"cross_attention_dim": 1024, "addition_embed_type": None}, "is a ControlNet of Stable Diffusion 2"),
        ({"global_pool_conditions": True}, "global_pool_conditions"),
        ({"conditioning_channels": 4}, "takes a picture of 4 channels"),
    ],
)
def test_a_folder_of_another_model_is_refused(net: Any, tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(SourceError, match=re.escape(message)):
        open_controlnet(_config(net[1], tmp_path / "other", **changes))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_controlnet", "zero_convs.0.0.weight"], "is a ControlLoRA"),
        (["input_blocks.1.0.in_layers.2.up", "zero_convs.0.0.weight"], "is a ControlLoRA"),
        (["lllite_unet_input_blocks_4_1.down.0.weight"], "is a ControlNet-LLLite"),
        (["task_embedding", "controlnet_down_blocks.0.weight"], "is a union ControlNet"),
        (["control_add_embedding.linear_1.weight", "controlnet_down_blocks.0.weight"], "is a union ControlNet"),
        (["adapter.body.0.in_conv.weight"], "is a T2I adapter"),
        (["controlnet_x_embedder.weight"], "is a ControlNet of a diffusion transformer"),
        (["down_blocks.0.resnets.0.conv1.weight"], "is not a ControlNet (it has no zero convolutions)"),
        (["control_model.zero_convs.0.0.weight"], "is a ControlNet of another model than SDXL"),
    ],
)
def test_a_file_of_another_model_is_refused(net: Any, tmp_path: Path, names: list[str], message: str) -> None:
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(SourceError, match=re.escape(message)):
        open_controlnet(tmp_path / "other.safetensors", configs=net[0])


def test_pickled_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "net.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(SourceError, match="is pickled, which can run code"):
        open_controlnet(tmp_path / "net.pth")
    with pytest.raises(SourceError, match="no such file"):
        open_controlnet(tmp_path / "net.safetensors")
    with pytest.raises(SourceError, match=r"has no config\.json"):
        open_controlnet(tmp_path)
