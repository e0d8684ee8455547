"""One safetensors file with LDM names: its kind, and its components as checkpoints under published names."""

__all__ = ["SingleFile", "open_single_file"]

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sdxl_trt.engines import CorruptError, SourceError
from sdxl_trt.engines.adapters import PICKLED, is_safetensors, unet_prefixes
from sdxl_trt.export.checkpoints import (
    Checkpoint,
    TensorInfo,
    check_header,
    left_out,
    open_clip_prefixes,
    open_file,
    vae_prefixes,
)
from sdxl_trt.export.sources.outlines import Outline, read_outline
from sdxl_trt.export.sources.predictions import SCHEDULE_WORDS

Tensors = Mapping[str, TensorInfo]
FileRole = Literal["base", "refiner", "unet", "vae"]

_UNET = "model.diffusion_model."
_FIRST_LAYERS = ("input_blocks.0.0.weight", "conv_in.weight")
_UNET_PREFIXES = (_UNET, "unet.", "")
_VAE_PREFIXES = ("first_stage_model.", "vae.", "")
_CLIP_G = {"base": "conditioner.embedders.1.model.", "refiner": "conditioner.embedders.0.model."}
_CLIP_L = "conditioner.embedders.0.transformer."
_ACCEPTED: dict[FileRole, tuple[str, ...]] = {
    "base": ("base",),
    "refiner": ("refiner",),
    "unet": ("unet", "base"),
    "vae": ("vae", "base", "refiner"),
}
_WANTED = {
    "base": "an SDXL base checkpoint", "refiner": "an SDXL refiner checkpoint", "unet": "a UNet of SDXL's base",
    "vae": "an SDXL autoencoder",
}  # fmt: skip
# Kinds of files: a pattern of a key that identifies each, the most specific first, and its description.
_SIGNS: tuple[tuple[str, str, str], ...] = (
    ("lora", r".*(lora_(up|down|mid|A|B|a|b)|lora_(unet|te\d?)_|[._]lora\.|hada_w\d|lokr_w\d).*", "a LoRA"),
    ("controlnet", r"(control_model|controlnet_\w+|input_hint_block)\..*", "a ControlNet"),
    ("edm", r"edm_(mean|std|vpred\.\w+)", "an SDXL fine-tune on EDM's schedule"),
    ("dit", r"(.*\.)?(joint_blocks|double_blocks|single_blocks|double_layers)\.\d+\..*", "a diffusion transformer"),
    ("base", r"conditioner\.embedders\.1\.model\..*", "an SDXL base checkpoint"),
    ("refiner", r"conditioner\.embedders\.0\.model\..*", "an SDXL refiner checkpoint"),
    ("sd2", r"cond_stage_model\.model\..*", "a Stable Diffusion 2 checkpoint"),
    ("sd1", r"cond_stage_model\..*", "a Stable Diffusion 1 checkpoint"),
    ("unet", r"(model\.diffusion_model\.|unet\.)?(input_blocks|down_blocks)\.\d+\..*", "a UNet without its encoders"),
    ("vae", r"(first_stage_model\.|vae\.)?decoder\.conv_in\.weight", "an autoencoder"),
    ("text", r"(.*\.)?(text_model\.|encoder\.layers\.\d+\.self_attn|transformer\.resblocks\.).*", "a text encoder"),
    ("embedding", r"clip_[lg]|emb_params|string_to_param\..*", "a textual inversion embedding"),
)
_OPTIONS = {"base": "--base", "refiner": "--refiner", "unet": "--unet", "vae": "--vae", "lora": "--lora"}


@dataclass(frozen=True)
class SingleFile:
    """An opened checkpoint file: its path, its kind ("base", "refiner", "unet" or "vae"), its tensors by stored name.

    `metadata` is the header's.
    """

    path: Path
    kind: str
    tensors: Tensors
    metadata: Mapping[str, str] = field(default_factory=dict)

    def checkpoint(self, component: str, config: Mapping[str, Any]) -> Checkpoint:
        """Return the tensors of a `component` (unet, vae, text_encoder, text_encoder_2) under published names.

        Raises SourceError if the file has none of them, like checkpoints without their autoencoder, and CorruptError
        if it has one tensor under two names.
        """
        inner = self._inner(component)
        if not inner:
            remedy = "give one with --vae" if component == "vae" else "get the whole checkpoint"
            prefix = self._prefixes()[component]
            raise SourceError(f"{self.path}: holds no {component} (no tensor starts with {prefix}); {remedy}")
        published: dict[str, TensorInfo] = {}
        for name, info in _PUBLISHED_NAMES[component](inner, config):
            if name in published:
                raise CorruptError(f"{self.path}: {info.key} and {published[name].key} are the same tensor; get the"
                                   " original checkpoint")  # fmt: skip
            published[name] = info
        return Checkpoint(published, self.metadata)

    def outline(self) -> Outline | None:
        """Return the outline of its UNet, or None if the names do not determine it."""
        return read_outline(self._inner("unet"))

    def shape(self, component: str, *endings: str) -> tuple[int, ...] | None:
        """Return the shape of the first tensor of a component whose stored name ends in one of `endings`, or None."""
        inner = self._inner(component)
        return next((info.shape for name, info in inner.items() if name.endswith(endings)), None)

    def _inner(self, component: str) -> dict[str, TensorInfo]:
        prefix = self._prefixes()[component]
        parts = {name.removeprefix(prefix): info for name, info in self.tensors.items() if name.startswith(prefix)}
        return {name: info for name, info in parts.items() if name not in SCHEDULE_WORDS}

    def unused(self) -> list[str]:
        """Return the tensors that belong to no component and are not known leftovers, sorted.

        Raises SourceError for one that would change the model.
        """
        prefixes = tuple(self._prefixes().values())
        markers = {*SCHEDULE_WORDS, "scaled_fp8"}
        outside = (name for name in self.tensors if not name.startswith(prefixes) and name not in markers)
        return left_out(outside, (), str(self.path))

    def _prefixes(self) -> dict[str, str]:
        """Return {component: prefix of its stored names}."""
        if self.kind == "vae":
            return {"vae": self._prefix_of(_VAE_PREFIXES, ("decoder.conv_in.weight",))}
        if self.kind == "unet":
            return {"unet": self._prefix_of(_UNET_PREFIXES, ("input_blocks.", "down_blocks."))}
        prefixes = {"unet": _UNET, "vae": _VAE_PREFIXES[0], "text_encoder_2": _CLIP_G[self.kind]}
        return prefixes | ({"text_encoder": _CLIP_L} if self.kind == "base" else {})

    def _prefix_of(self, prefixes: Iterable[str], starts: Iterable[str]) -> str:
        wanted = [(prefix, tuple(prefix + start for start in starts)) for prefix in prefixes]
        return next(prefix for prefix, full in wanted if any(name.startswith(full) for name in self.tensors))


def open_single_file(path: Path, role: FileRole) -> SingleFile:
    """Open the safetensors file at `path` as a base, a refiner, a UNet or an autoencoder; only its header is read.

    A whole SDXL checkpoint is accepted as an autoencoder too, and a base as a UNet. The content decides, not the name:
    a file named .ckpt that holds safetensors is read. Raises SourceError for a missing or pickled file and for one
    of another kind, naming that kind and the option for it; CorruptError for a broken one.
    """
    option = _OPTIONS[role]
    if path.suffix in PICKLED and not (path.is_file() and is_safetensors(path)):
        raise SourceError(f"{option} {path}: is pickled, which can run code when loaded; get the model as .safetensors")
    if not path.is_file():
        raise SourceError(f"{option} {path}: no such file; give a .safetensors checkpoint or a diffusers folder")
    opened = open_file(path)
    kind, what = _identify(opened.tensors)
    if kind not in _ACCEPTED[role]:
        remedy = f"which goes to {_OPTIONS[kind]}" if kind in _OPTIONS else "which is not supported"
        raise SourceError(f"{option} {path}: is {what}, {remedy}; {option} takes {_WANTED[role]}")
    check_header(opened.tensors, opened.metadata, f"{option} {path}")
    file = SingleFile(path, kind, opened.tensors, opened.metadata)
    if kind != "vae":
        _check_inputs(file, f"{option} {path}")
    return file


def _identify(tensors: Tensors) -> tuple[str, str]:
    """Return the kind of a file and its description, from its keys."""
    for kind, sign, what in _SIGNS:
        pattern = re.compile(sign)
        if any(pattern.fullmatch(name) for name in tensors):
            whole = kind not in ("base", "refiner") or any(name.startswith(_UNET) for name in tensors)
            return (kind, what) if whole else ("text", "a pair of text encoders without a UNet")
    return "", "not an SDXL checkpoint (it has no known tensor name)"


def _check_inputs(file: SingleFile, where: str) -> None:
    """Raise SourceError for an inpainting or edit model, whose UNet takes more channels than the latents have."""
    shape = file.shape("unet", *_FIRST_LAYERS) or ()
    channels = shape[1] if len(shape) == 4 else 4
    if channels > 4:
        kind = "an inpainting model" if channels == 9 else "an edit model"
        raise SourceError(f"{where}: is {kind} (its UNet takes {channels} channels), which is not supported; give the"
                          " text-to-image checkpoint")  # fmt: skip


def _renamed(tensors: Tensors, prefixes: Mapping[str, str]) -> Iterator[tuple[str, TensorInfo]]:
    """Yield (name, tensor) with modules renamed by `prefixes`; unknown names stay, for a later warning."""
    for name, info in tensors.items():
        module, _, parameter = name.rpartition(".")
        yield (f"{prefixes[module]}.{parameter}" if module in prefixes else name), info


def _unet(tensors: Tensors, config: Mapping[str, Any]) -> Iterator[tuple[str, TensorInfo]]:
    return _renamed(tensors, unet_prefixes(config))


def _vae(tensors: Tensors, config: Mapping[str, Any]) -> Iterator[tuple[str, TensorInfo]]:
    return _renamed(tensors, vae_prefixes(config))


def _clip(tensors: Tensors, _: Mapping[str, Any]) -> Iterator[tuple[str, TensorInfo]]:
    yield from tensors.items()


def _open_clip(tensors: Tensors, config: Mapping[str, Any]) -> Iterator[tuple[str, TensorInfo]]:
    """Yield OpenCLIP's tensors under transformers' names: fused q, k, v split, the text projection transposed."""
    for name, info in _renamed(tensors, open_clip_prefixes(config)):
        module, _, parameter = name.rpartition(".")
        if name == "positional_embedding":
            yield "text_model.embeddings.position_embedding.weight", info
        elif name == "text_projection":
            yield "text_projection.weight", info.transpose()
        elif parameter in ("in_proj_weight", "in_proj_bias"):
            for index, part in enumerate("qkv"):
                yield f"{module}.{part}_proj.{parameter.removeprefix('in_proj_')}", info.part(index, 3)
        else:
            yield name, info


_PUBLISHED_NAMES: dict[str, Callable[[Tensors, Mapping[str, Any]], Iterator[tuple[str, TensorInfo]]]] = {
    "text_encoder": _clip,
    "text_encoder_2": _open_clip,
    "unet": _unet,
    "vae": _vae,
}
