"""A ControlNet for the base, in any of its published layouts; other kinds of control models are refused by name."""

__all__ = ["ControlNetSource", "open_controlnet"]

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from sdxl_trt.engines import SourceError
from sdxl_trt.engines.adapters import PICKLED, is_safetensors
from sdxl_trt.engines.host import known_as
from sdxl_trt.export.checkpoints import (
    Checkpoint,
    TensorInfo,
    check_header,
    controlnet_prefixes,
    left_out,
    open_file,
    unquantized,
)
from sdxl_trt.export.sources.configs import PUBLISHED, read_json
from sdxl_trt.export.sources.hub import Snapshot, fetch_controlnet
from sdxl_trt.export.sources.source import ModelSource, find_source, folder_config, open_folder

_CLASS, _STEM = "ControlNetModel", "diffusion_pytorch_model"
_PREFIXES = ("control_model.", "controlnet.", "")
_FOREIGN_CLASSES = {
    "ControlNetUnionModel": "a union ControlNet",
    "ControlNetXSAdapter": "a ControlNet-XS",
    "T2IAdapter": "a T2I adapter",
    "UNet2DConditionModel": "a UNet",
}
# Patterns of tensors of control models that are not ControlNets of SDXL, the most specific first.
_FOREIGN = (
    (r"lora_controlnet|(.*\.)?lora_(up|down)\..*|.*\.(up|down)$", "a ControlLoRA"),
    (r"lllite_.*", "a ControlNet-LLLite"),
    (r"(.*\.)?(task_embedding|control_add_embedding|transformer_layes|spatial_ch_projs)(\..*)?", "a union ControlNet"),
    (r"(adapter\.)?body\.\d+\..*", "a T2I adapter"),
    (r"(.*\.)?(controlnet_x_embedder|controlnet_blocks|double_blocks|transformer_blocks)\..*",
     "a ControlNet of a diffusion transformer"),
)  # fmt: skip
_WIDTHS = {768: "a ControlNet of Stable Diffusion 1", 1024: "a ControlNet of Stable Diffusion 2"}
_TAKES = "--controlnet takes a ControlNet of SDXL"
_FROM_UNET = (
    "act_fn", "addition_embed_type", "addition_time_embed_dim", "attention_head_dim", "block_out_channels",
    "cross_attention_dim", "down_block_types", "in_channels", "layers_per_block", "mid_block_type", "norm_num_groups",
    "num_attention_heads", "projection_class_embeddings_input_dim", "transformer_layers_per_block", "upcast_attention",
    "use_linear_projection",
)  # fmt: skip


@dataclass(frozen=True)
class ControlNetSource:
    """A ControlNet; `name` is what a run calls it: that of its file, folder or repository, without a folder."""

    name: str
    model: ModelSource


def open_controlnet(spec: str | Path, *, precision: str = "fp32", configs: Path | None = None) -> ControlNetSource:
    """Open a ControlNet of SDXL from a diffusers folder, a hub id, or a .safetensors file.

    A file has diffusers' names or those of ControlNet's authors, with or without ``control_model.``. Its config is
    that of SDXL's base, or of the UNet whose folder is `configs`, with the file's blocks. Raises SourceError, naming
    the model, for pickled files, ControlNets of other models, union ControlNets, ControlLoRAs and T2I adapters;
    CorruptError for broken files.
    """
    found = find_source("--controlnet", spec, fetch_controlnet, precision)
    if isinstance(found, Path):
        return _file(found, PUBLISHED / "base" / "unet" if configs is None else configs)
    return _folder(found)


def _folder(found: Snapshot) -> ControlNetSource:
    root = found.folder
    where = f"--controlnet {root}"
    config = folder_config(root, where, _CLASS, _TAKES, _FOREIGN_CLASSES)
    width = config.get("cross_attention_dim")
    _refuse_other(where, width if isinstance(width, int) else None,
                  added=config.get("addition_embed_type") == "text_time")  # fmt: skip
    _check_config(config, where)
    opened = partial(open_folder, root, _STEM, found.variant, config)
    # A repository's folder in the cache is called like the commit, which its name ends with.
    name = PurePosixPath(found.name).name.removesuffix(f"@{root.name}")
    return ControlNetSource(name, ModelSource(str(root), found.name, _CLASS, unquantized(config), opened))


def _check_config(config: Mapping[str, Any], where: str) -> None:
    if config.get("global_pool_conditions"):
        raise SourceError(f"{where}: averages its residuals over the picture (global_pool_conditions), which is not"
                          " supported; give a ControlNet without it")  # fmt: skip
    channels = config.get("conditioning_channels", 3)
    if channels != 3:
        raise SourceError(f"{where}: takes a picture of {channels} channels, which is not supported; give a ControlNet"
                          " that takes 3")  # fmt: skip


def _file(path: Path, configs: Path) -> ControlNetSource:
    where = f"--controlnet {path}"
    if path.suffix in PICKLED and not (path.is_file() and is_safetensors(path)):
        raise SourceError(f"{where}: is pickled, which can run code when loaded; get the model as .safetensors")
    if not path.is_file():
        raise SourceError(f"{where}: no such file; give a .safetensors file or a diffusers folder")
    opened = open_file(path)
    _refuse_foreign(opened.tensors, where)
    check_header(opened.tensors, opened.metadata, where)
    usual = read_json(configs / "config.json")
    inner = dict(_renamed(opened.tensors, usual))
    context = next((info.shape for name, info in inner.items() if name.endswith(".attn2.to_k.weight")), ())
    _refuse_other(where, context[-1] if context else None, added="add_embedding.linear_1.weight" in inner)
    config = _config_of(usual, inner)
    model = ModelSource(str(path), known_as(path), _CLASS, config,
                        partial(Checkpoint, inner, opened.metadata))  # fmt: skip
    return ControlNetSource(path.stem, model)


def _refuse_foreign(names: Iterable[str], where: str) -> None:
    stored = list(names)
    for sign, what in _FOREIGN:
        pattern = re.compile(sign)
        if any(pattern.fullmatch(name) for name in stored if ".transformer_blocks." not in name):
            raise SourceError(f"{where}: is {what}, which is not supported; {_TAKES}")
    if not any(re.fullmatch(r"(.*\.)?(zero_convs|controlnet_down_blocks)\.0\..*", name) for name in stored):
        raise SourceError(f"{where}: is not a ControlNet (it has no zero convolutions); {_TAKES}")


def _refuse_other(where: str, width: int | None, *, added: bool) -> None:
    if not added or width in _WIDTHS:
        raise SourceError(f"{where}: is {_WIDTHS.get(width or 0, 'a ControlNet of another model than SDXL')}; {_TAKES}")


def _renamed(tensors: Mapping[str, TensorInfo], usual: Mapping[str, Any]) -> Iterator[tuple[str, TensorInfo]]:
    """Yield the tensors under diffusers' names; unknown names stay, for a later warning."""
    prefix = next(each for each in _PREFIXES if any(name.startswith(each) for name in tensors))
    modules = controlnet_prefixes(usual)
    outside = [name for name in tensors if not name.startswith(prefix)]
    left_out(outside, (), "--controlnet")  # raises for one that would change the model
    for name, info in tensors.items():
        if name.startswith(prefix):
            module, _, parameter = name.removeprefix(prefix).rpartition(".")
            yield f"{modules.get(module, module)}.{parameter}".lstrip("."), info


def _config_of(usual: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the config of a ControlNet of the UNet whose config is `usual`, with the blocks that `names` have."""
    stored = list(names)
    config = {name: usual[name] for name in _FROM_UNET if name in usual}
    levels = len(config["block_out_channels"])
    depths = [_depth(stored, rf"down_blocks\.{level}\.attentions\.0") for level in range(levels)]
    middle = _depth(stored, r"mid_block\.attentions\.0")
    config["down_block_types"] = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    config["mid_block_type"] = "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D"
    # diffusers needs a depth for every level; the coarsest level's is also the middle block's.
    config["transformer_layers_per_block"] = [*(depth or 1 for depth in depths[:-1]), middle or depths[-1] or 1]
    convolutions = [name for name in stored if re.fullmatch(r"controlnet_cond_embedding\.blocks\.\d+\.weight", name)]
    widths = (16, 32, 96, 256)
    config["conditioning_embedding_out_channels"] = widths[: len(convolutions) // 2 + 1]
    return config


def _depth(names: Iterable[str], place: str) -> int:
    """Return how many transformer blocks the attention at `place` has."""
    found = [re.match(rf"{place}\.transformer_blocks\.(\d+)\.", name) for name in names]
    return max((int(match[1]) + 1 for match in found if match), default=0)
