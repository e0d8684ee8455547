"""The ControlNets of an export, planned without tracing: names, keys, and what does not fit the base."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_trt.engines.errors import SdxlTrtError, SourceError, UsageError
from sdxl_trt.export.components import Options
from sdxl_trt.export.exporter import ExportPlan, plan_export
from sdxl_trt.runtime.pairs import PAIRS


@pytest.fixture(scope="module")
def base(pairs: Callable[[str], Any]) -> Path:
    return Path(pairs("outline").base)


@pytest.fixture(scope="module")
def net(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    folder = tmp_path_factory.mktemp("nets") / "canny"
    ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32)).save_pretrained(folder)
    return folder


def _plan(base: Path, out: Path, *nets: Path, **options: Any) -> ExportPlan:
    return plan_export(base, None, out, Options(precision="fp32", controlnets=nets, **options))


def test_each_controlnet_is_a_component_and_only_the_unet_s_key_changes(base: Path, net: Path, tmp_path: Path) -> None:
    other = tmp_path / "depth"
    shutil.copytree(net, other)
    without, plan = _plan(base, tmp_path / "out"), _plan(base, tmp_path / "out", net, other)
    assert plan.stages["base"].controlnets == {"controlnet": "canny", "controlnet_2": "depth"}
    assert plan.jobs.keys() - without.jobs.keys() == {"controlnet", "controlnet_2"}
    changed = {name for name, job in without.jobs.items() if plan.jobs[name].key != job.key}
    assert changed == {"unet"}
    assert plan.jobs["unet"].plan.digest == without.jobs["unet"].plan.digest, "the weights are the same"
    assert plan.needs.disk > without.needs.disk


def test_a_controlnet_alone_can_be_chosen(base: Path, net: Path, tmp_path: Path) -> None:
    plan = _plan(base, tmp_path / "out", net, components=frozenset({"controlnet"}))
    assert list(plan.jobs) == ["controlnet"]
    with pytest.raises(UsageError, match="--components controlnet: this model has no such component"):
        _plan(base, tmp_path / "out", components=frozenset({"controlnet"}))
    with pytest.raises(UsageError, match="--components controlnet_1: choose from"):
        Options(components=frozenset({"controlnet_1"}))


REFUSED: list[tuple[dict[str, Any], type[SdxlTrtError], str]] = [
    ({"block_out_channels": [16, 32]}, SourceError, "has other residuals than the base's UNet"),
    ({"in_channels": 9}, SourceError, "has input channels 9, not 4 as the base's UNet"),
    ({"cross_attention_dim": 64}, SourceError, "has context width 64, not 80 as the base's UNet"),
    ({"conditioning_embedding_out_channels": [16, 32, 32]}, SourceError, "has pixels per latent 4, not 2"),
    ({"projection_class_embeddings_input_dim": 90}, SourceError, "the UNet's added conditions have width 90"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED, ids=[message[:20] for *_, message in REFUSED])
def test_a_controlnet_of_another_base_is_refused(
    base: Path, net: Path, tmp_path: Path, changes: dict[str, Any], error: type[SdxlTrtError], message: str
) -> None:
    from diffusers import ControlNetModel

    config = json.loads((net / "config.json").read_text()) | changes
    if "block_out_channels" in changes:
        config |= {name: config[name][:2] for name in
                   ("down_block_types", "attention_head_dim", "transformer_layers_per_block")}  # fmt: skip
        config["num_attention_heads"] = None
    folder = tmp_path / "other"
    ControlNetModel.from_config(config).save_pretrained(folder)
    with pytest.raises(error, match=message):
        _plan(base, tmp_path / "out", folder)


@pytest.mark.parametrize("channels", [4, 9])
def test_an_inpainting_base_takes_none(base: Path, net: Path, tmp_path: Path, channels: int) -> None:
    """Not one that was trained on such a base either: no reference gives a ControlNet the mask."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    nine, other = Path(shutil.copytree(base, tmp_path / "nine")), tmp_path / "other"
    config = json.loads((nine / "unet" / "config.json").read_text()) | {"in_channels": 9}
    UNet2DConditionModel.from_config(config).save_pretrained(nine / "unet")
    index = json.loads((nine / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionXLInpaintPipeline"}
    (nine / "model_index.json").write_text(json.dumps(index))
    changed = json.loads((net / "config.json").read_text()) | {"in_channels": channels}
    ControlNetModel.from_config(changed).save_pretrained(other)
    said = PAIRS["nine channels", "ControlNet"].refused
    with pytest.raises(SourceError, match=rf"{said} with 9; leave --controlnet out, or export a base of 4 channels"):
        _plan(nine, tmp_path / "out", other)


def test_two_of_one_name_are_refused(base: Path, net: Path, tmp_path: Path) -> None:
    shutil.copytree(net, tmp_path / "canny")
    with pytest.raises(UsageError, match="two are called 'canny'; rename one of the files"):
        _plan(base, tmp_path / "out", net, tmp_path / "canny")
