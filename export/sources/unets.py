"""A UNet that replaces the base's own, as published for distilled models."""

__all__ = ["UNetSource", "open_unet", "with_unet"]

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sdxl_trt.engines import SourceError
from sdxl_trt.engines.host import known_as
from sdxl_trt.export.checkpoints import unquantized
from sdxl_trt.export.sources.configs import PUBLISHED, read_json
from sdxl_trt.export.sources.hub import Snapshot, fetch_unet
from sdxl_trt.export.sources.predictions import said_schedule
from sdxl_trt.export.sources.scheduler_config import read_scheduler
from sdxl_trt.export.sources.single_file import SingleFile, open_single_file
from sdxl_trt.export.sources.source import (
    ModelSource,
    PipelineSource,
    find_source,
    folder_config,
    open_folder,
    outlined,
    warn_of_unused,
)

log = logging.getLogger("sdxl_trt.export")
_CLASS, _STEM = "UNet2DConditionModel", "diffusion_pytorch_model"
_REFINER_WIDTH = 1280
_WIDTHS = {768: "a UNet of Stable Diffusion 1", 1024: "a UNet of Stable Diffusion 2"}
# Scheduler settings that belong to the UNet, not to its sampling, with the defaults of diffusers' schedulers.
_PREDICTED: dict[str, Any] = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}


@dataclass(frozen=True)
class UNetSource:
    """A UNet, and the scheduler settings that its source states: none in most files."""

    model: ModelSource
    schedule: Mapping[str, Any]


def open_unet(spec: str | Path, *, precision: str = "fp32", configs: Path | None = None) -> UNetSource:
    """Open a UNet to replace a base's, from its own diffusers folder, a pipeline's, a hub id, or a single file.

    A single file has LDM names, with or without ``model.diffusion_model.``, or diffusers' names; it may be a whole
    checkpoint. Its config is the published one, or the folder `configs`' ``config.json``, with the file's blocks.
    Raises SourceError, naming the model, for UNets of other models, and CorruptError.
    """
    found = find_source("--unet", spec, fetch_unet, precision)
    if isinstance(found, Path):
        return _file(found, PUBLISHED / "base" / "unet" if configs is None else configs)
    return _folder(found)


def with_unet(pipeline: PipelineSource, unet: UNetSource) -> PipelineSource:
    """Return a base with another UNet; `plan_components` checks that it fits the encoders.

    The prediction type is the UNet's if its source states it, with a warning; the rest of the schedule is the base's.
    """
    where, config = unet.model.where, pipeline.scheduler_config
    changed = {name: value for name, value in unet.schedule.items() if config.get(name, _PREDICTED.get(name)) != value}
    if changed:
        settings = ", ".join(f"{name} {value}" for name, value in changed.items())
        log.warning("%s: this UNet has %s, unlike the base's scheduler; using the UNet's", where, settings)
        config = config | changed
    log.warning("%s: replaces the base's UNet, but the base's schedule stays; a distilled UNet (Lightning, DMD2, Hyper,"
                " Turbo) needs the steps, the spacing and the guidance from its model card", where)  # fmt: skip
    return replace(
        pipeline,
        models=pipeline.models | {"unet": unet.model},
        scheduler=read_scheduler(config, where) if changed else pipeline.scheduler,
        scheduler_config=config,
    )


def _file(path: Path, configs: Path) -> UNetSource:
    file = open_single_file(path, "unet")
    config = read_json(configs / "config.json")
    if file.kind == "unet":
        _check_names(file)
        warn_of_unused(file)
    config = outlined(file, config)
    schedule = said_schedule(file.tensors, file.metadata, str(path), log.warning)
    model = ModelSource(str(path), known_as(path), _CLASS, config, partial(file.checkpoint, "unet", config))
    return UNetSource(model, schedule)


def _check_names(file: SingleFile) -> None:
    """Raise SourceError for the UNet of another model, recognized by its tensors' names and shapes."""
    context = file.shape("unet", ".attn2.to_k.weight")
    width = context[-1] if context else None
    added = file.shape("unet", "label_emb.0.0.weight", "add_embedding.linear_1.weight")
    _refuse_other(f"--unet {file.path}", width, added=added is not None,
                  distilled=file.shape("unet", "cond_proj.weight") is not None)  # fmt: skip


def _refuse_other(where: str, width: int | None, *, added: bool, distilled: bool) -> None:
    what = ""
    if distilled:
        what = "a latent consistency model (LCM), whose UNet takes the guidance scale, which is not supported; fuse an"
        what += " LCM LoRA with --lora instead"
    elif width == _REFINER_WIDTH and added:
        what = "the refiner's UNet; --unet replaces the base's, a refiner goes to --refiner"
    elif not added or width in _WIDTHS:
        what = f"{_WIDTHS.get(width or 0, 'a UNet of another model than SDXL')}; --unet takes a UNet of SDXL's base"
    if what:
        raise SourceError(f"{where}: is {what}")


def _folder(found: Snapshot) -> UNetSource:
    root = found.folder
    inner = (root / "unet" / "config.json").is_file()
    folder, name = (root / "unet", f"{found.name}/unet") if inner else (root, found.name)
    where = f"--unet {root}"
    config = folder_config(folder, where, _CLASS, f"--unet takes a {_CLASS}")
    _check_config(config, where)
    opened = partial(open_folder, folder, _STEM, found.variant, config)
    model = ModelSource(str(folder), name, _CLASS, unquantized(config), opened)
    return UNetSource(model, _pipelines_schedule(root) if inner else {})


def _check_config(config: Mapping[str, Any], where: str) -> None:
    channels, width = config.get("in_channels", 4), config.get("cross_attention_dim")
    if channels == 8:
        raise SourceError(f"{where}: is an edit model (its UNet takes 8 channels), which is not supported; give the"
                          " text-to-image or the inpainting UNet")  # fmt: skip
    added = config.get("addition_embed_type") == "text_time"
    _refuse_other(where, width if isinstance(width, int) else None, added=added,
                  distilled=bool(config.get("time_cond_proj_dim")))  # fmt: skip


def _pipelines_schedule(root: Path) -> dict[str, Any]:
    """Return the prediction settings in the scheduler config of a pipeline's UNet.

    Raises SourceError if the UNet was trained on another kind of schedule than the base's, EDM's or a flow's.
    """
    path = root / "scheduler" / "scheduler_config.json"
    config = read_json(path) if path.is_file() else {}
    class_name = str(config.get("_class_name", ""))
    if class_name.startswith(("EDM", "Flow")):
        raise SourceError(f"--unet {root}: its scheduler is a {class_name}, so the UNet was not trained on the schedule"
                          " of SDXL's base; give the whole pipeline with --base")  # fmt: skip
    return {name: config.get(name) or usual for name, usual in _PREDICTED.items()} if config else {}
