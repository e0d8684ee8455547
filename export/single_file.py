"""One safetensors file with LDM names: what it is, and its parts as checkpoints under published names."""

__all__ = ["SingleFile", "open_single_file"]

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sdxl_trt.engines.errors import SourceError
from sdxl_trt.export.ldm import open_clip_prefixes, unet_prefixes, vae_prefixes
from sdxl_trt.export.tensors import Checkpoint, TensorInfo, known_extra, open_file
from sdxl_trt.export.weight_files import PICKLED

Tensors = Mapping[str, TensorInfo]
FileRole = Literal["base", "refiner", "vae"]

_UNET = "model.diffusion_model."
_FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"
_VAE_PREFIXES = ("first_stage_model.", "vae.", "")
_CLIP_G = {"base": "conditioner.embedders.1.model.", "refiner": "conditioner.embedders.0.model."}
_CLIP_L = "conditioner.embedders.0.transformer."
_ACCEPTED: dict[FileRole, tuple[str, ...]] = {
    "base": ("base",),
    "refiner": ("refiner",),
    "vae": ("vae", "base", "refiner"),
}
_WANTED = {"base": "an SDXL base checkpoint", "refiner": "an SDXL refiner checkpoint", "vae": "an SDXL autoencoder"}
# Kinds of files by a key that gives them away, the most telling first, and what they are called.
_SIGNS: tuple[tuple[str, str, str], ...] = (
    ("lora", r".*(lora_(up|down|mid|A|B|a|b)|lora_(unet|te\d?)_|[._]lora\.|hada_w\d|lokr_w\d).*", "a LoRA"),
    ("scaled", r"scaled_fp8|.*\.(scale_weight|weight_scale|comfy_quant|absmax|quant_map)", "a quantized checkpoint"),
    ("controlnet", r"(control_model|controlnet_\w+|input_hint_block)\..*", "a ControlNet"),
    ("edm", r"edm_(mean|std|vpred\.\w+)", "an SDXL fine-tune on EDM's schedule"),
    ("dit", r"(.*\.)?(joint_blocks|double_blocks|single_blocks|double_layers)\.\d+\..*", "a diffusion transformer"),
    ("base", r"conditioner\.embedders\.1\.model\..*", "an SDXL base checkpoint"),
    ("refiner", r"conditioner\.embedders\.0\.model\..*", "an SDXL refiner checkpoint"),
    ("sd2", r"cond_stage_model\.model\..*", "a Stable Diffusion 2 checkpoint"),
    ("sd1", r"cond_stage_model\..*", "a Stable Diffusion 1 checkpoint"),
    ("unet", r"(model\.diffusion_model\.)?(input_blocks|down_blocks)\.\d+\..*", "a UNet without its encoders"),
    ("vae", r"(first_stage_model\.|vae\.)?decoder\.conv_in\.weight", "an autoencoder"),
    ("text", r"(.*\.)?(text_model\.|encoder\.layers\.\d+\.self_attn|transformer\.resblocks\.).*", "a text encoder"),
    ("embedding", r"clip_[lg]|emb_params|string_to_param\..*", "a textual inversion embedding"),
)
_OPTIONS = {"base": "--base", "refiner": "--refiner", "vae": "--vae", "lora": "--lora"}


@dataclass(frozen=True)
class SingleFile:
    """An opened checkpoint file: its path, its kind ("base", "refiner" or "vae") and all its tensors by stored name."""

    path: Path
    kind: str
    tensors: Tensors

    @property
    def v_prediction(self) -> bool:
        """Whether the file says that its UNet predicts v; trainers mark it with an empty tensor ``v_pred``."""
        return "v_pred" in self.tensors

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the file says that it was trained on a schedule that ends in pure noise (``ztsnr``)."""
        return "ztsnr" in self.tensors

    def checkpoint(self, component: str, config: Mapping[str, Any]) -> Checkpoint:
        """Return the tensors of a `component` (unet, vae, text_encoder, text_encoder_2) under published names.

        Raises SourceError where the file holds none of them, as checkpoints do whose autoencoder was taken out.
        """
        prefix = self._prefixes()[component]
        inner = {name.removeprefix(prefix): info for name, info in self.tensors.items() if name.startswith(prefix)}
        if not inner:
            remedy = "give one with --vae" if component == "vae" else "get the whole checkpoint"
            raise SourceError(f"{self.path}: holds no {component} (no tensor starts with {prefix}); {remedy}")
        return Checkpoint(dict(_PUBLISHED_NAMES[component](inner, config)))

    def unused(self) -> list[str]:
        """Return the tensors that belong to no part and are not known to come with such files, sorted."""
        prefixes = tuple(self._prefixes().values())
        return sorted(name for name in self.tensors if not name.startswith(prefixes) and not known_extra(name))

    def _prefixes(self) -> dict[str, str]:
        """Return the prefix of each part's stored names."""
        if self.kind == "vae":
            return {
                "vae": next(prefix for prefix in _VAE_PREFIXES if f"{prefix}decoder.conv_in.weight" in self.tensors)
            }
        prefixes = {"unet": _UNET, "vae": _VAE_PREFIXES[0], "text_encoder_2": _CLIP_G[self.kind]}
        return prefixes | ({"text_encoder": _CLIP_L} if self.kind == "base" else {})


def open_single_file(path: Path, role: FileRole) -> SingleFile:
    """Open the safetensors file at `path` as a base, a refiner or an autoencoder; only its header is read.

    A whole SDXL checkpoint serves as an autoencoder too. Raises SourceError for a missing or pickled file and for one
    of another kind, saying what it is and which option takes it; CorruptError for a broken one.
    """
    option = _OPTIONS[role]
    if path.suffix in PICKLED:
        raise SourceError(f"{option} {path}: is pickled, which can run code when loaded; get the .safetensors of it")
    if not path.is_file():
        raise SourceError(f"{option} {path}: no such file; give a .safetensors checkpoint or a diffusers folder")
    tensors = open_file(path).tensors
    kind, what = _identify(tensors)
    if kind not in _ACCEPTED[role]:
        remedy = f"which goes to {_OPTIONS[kind]}" if kind in _OPTIONS else "which is not supported"
        raise SourceError(f"{option} {path}: is {what}, {remedy}; {option} takes {_WANTED[role]}")
    _check_inputs(tensors, f"{option} {path}")
    return SingleFile(path, kind, tensors)


def _identify(tensors: Tensors) -> tuple[str, str]:
    """Return the kind of a file and what to call it, from its keys."""
    for kind, sign, what in _SIGNS:
        pattern = re.compile(sign)
        if any(pattern.fullmatch(name) for name in tensors):
            whole = kind not in ("base", "refiner") or any(name.startswith(_UNET) for name in tensors)
            return (kind, what) if whole else ("text", "a pair of text encoders without a UNet")
    return "", "no SDXL checkpoint (none of its names is known)"


def _check_inputs(tensors: Tensors, where: str) -> None:
    """Raise SourceError for an inpainting or edit model, whose UNet takes more than latents."""
    first = tensors.get(_FIRST_LAYER)
    channels = first.shape[1] if first is not None and len(first.shape) == 4 else 4
    if channels > 4:
        kind = "an inpainting model" if channels == 9 else "an edit model"
        raise SourceError(f"{where}: is {kind} (its UNet takes {channels} channels), which is not supported; give the"
                          " text-to-image checkpoint")  # fmt: skip


def _renamed(tensors: Tensors, prefixes: Mapping[str, str]) -> Iterator[tuple[str, TensorInfo]]:
    """Yield tensors under the names of their modules in `prefixes`; unknown ones keep theirs, to be warned of."""
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
    """Yield OpenCLIP's tensors under transformers' names: fused projections in three, the last one transposed."""
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
