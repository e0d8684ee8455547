"""Models without weights: an SDXL model built from its config on the meta device."""

__all__ = ["MetaModel", "build_model"]

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import init_empty_weights

from sdxl_trt.engines import SourceError


@dataclass(frozen=True)
class MetaModel:
    """A module whose parameters have shapes but no storage.

    `state` maps the published tensor names to shapes: what a checkpoint must contain. `buffers` are the values that
    the model computes when it is built (position ids), by their names in the module.
    """

    module: torch.nn.Module
    state: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]


def build_model(class_name: str, config: Mapping[str, Any], where: str) -> MetaModel:
    """Build the model `class_name` from `config` with empty parameters, in evaluation mode.

    Raises SourceError for a class that is not part of SDXL, and for a config that the class refuses.
    """
    if class_name not in _BUILDERS:
        raise SourceError(f"{where}: class {class_name} is not an SDXL component; expected {', '.join(_BUILDERS)}")
    try:
        with init_empty_weights(include_buffers=False), _quiet():
            module = _BUILDERS[class_name](dict(config))
    except Exception as exc:  # the libraries refuse configs with exceptions of every kind
        raise SourceError(
            f"{where}: {class_name} refuses this config ({exc}); restore the model's config.json"
        ) from exc
    module.eval().requires_grad_(False)
    parameters = dict(module.state_dict())
    state = {published_name(name, class_name): tuple(tensor.shape) for name, tensor in parameters.items()}
    buffers = {name: tensor.clone() for name, tensor in module.named_buffers() if name not in parameters}
    resolved = dict(module.config if isinstance(module.config, Mapping) else module.config.to_dict())
    return MetaModel(module.to("meta"), state, buffers, resolved)


def published_name(name: str, class_name: str) -> str:
    """Return the name under which published checkpoints store the parameter `name` of a module.

    transformers 5 dropped the ``text_model.`` prefix from CLIPTextModel; published SDXL folders have it.
    """
    bare = class_name == "CLIPTextModel" and not name.startswith("text_model.")
    return f"text_model.{name}" if bare else name


def _diffusers(class_name: str) -> Callable[[dict[str, Any]], torch.nn.Module]:
    def build(config: dict[str, Any]) -> torch.nn.Module:
        import diffusers  # noqa: PLC0415 - takes seconds to import, needed only to build a model

        return cast("torch.nn.Module", getattr(diffusers, class_name).from_config(config))

    return build


def _clip(class_name: str) -> Callable[[dict[str, Any]], torch.nn.Module]:
    def build(config: dict[str, Any]) -> torch.nn.Module:
        import transformers  # noqa: PLC0415 - takes seconds to import, needed only to build a model

        settings = transformers.CLIPTextConfig.from_dict(config)
        # Eager attention adds an explicit causal mask; sdpa has it as a flag that every engine fuses.
        settings._attn_implementation = "sdpa"  # noqa: SLF001 - the documented argument needs from_pretrained
        return cast("torch.nn.Module", getattr(transformers, class_name)(settings))

    return build


_BUILDERS: dict[str, Callable[[dict[str, Any]], torch.nn.Module]] = {
    "UNet2DConditionModel": _diffusers("UNet2DConditionModel"),
    "ControlNetModel": _diffusers("ControlNetModel"),
    "AutoencoderKL": _diffusers("AutoencoderKL"),
    "AutoencoderTiny": _diffusers("AutoencoderTiny"),
    "CLIPTextModel": _clip("CLIPTextModel"),
    "CLIPTextModelWithProjection": _clip("CLIPTextModelWithProjection"),
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' warnings about configs; this project checks them itself."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
