"""/object_info and the other lists: the nodes that this server has, and the names that their menus offer."""

__all__ = ["Names", "folders", "names_of", "object_info", "system_stats"]

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sdxl_trt.engines.bundle import Manifest
from sdxl_trt.engines.host import available_host_memory
from sdxl_trt.runtime.comfyui import NODES, Input, NodeKind
from sdxl_trt.runtime.diffusion.samplers import sampler_names
from sdxl_trt.runtime.diffusion.schedules import COMFYUI_SCHEDULES
from sdxl_trt.server.comfyui.validation import OUTPUTS
from sdxl_trt.server.options import Options

VERSION = "0.18.1"
"""The ComfyUI whose results this server has."""
MOST_FILES = 10_000
ENDING = ".safetensors"
SHELLS = {
    "UNETLoader": {"unet_name": [[], {}], "weight_dtype": [["default"], {}]},
}
"""Classes that clients look for their menus in, without anything in these: they are not supported."""
_STEPS = {"cfg": 0.1, "denoise": 0.01}


@dataclass(frozen=True)
class Names:
    """What menus offer."""

    checkpoints: Sequence[str] = ()
    loras: Sequence[str] = ()
    embeddings: Sequence[str] = ()
    controlnets: Sequence[str] = ()
    pictures: Sequence[str] = ()

    @property
    def menus(self) -> Mapping[str, Sequence[str]]:
        """Return the menus by the names of the inputs that have them."""
        return {
            "ckpt_name": self.checkpoints, "vae_name": (), "lora_name": self.loras, "image": self.pictures,
            "control_net_name": self.controlnets, "sampler_name": sampler_names(comfyui=True),
            "scheduler": [*COMFYUI_SCHEDULES],
        }  # fmt: skip


def names_of(manifest: Manifest, options: Options, pictures: Sequence[str] = ()) -> Names:
    """Return the names of a bundle's models, and of the files in the folders of LoRAs and embeddings."""
    stages = manifest.stages().values()
    sources = [manifest.components[stage.unet].source.name.removesuffix("/unet") for stage in stages]
    fused = [record.name for record in manifest.loras]
    return Names(
        checkpoints=[*dict.fromkeys(PurePosixPath(name.replace("\\", "/")).name for name in sources)],
        loras=[*dict.fromkeys([*_files(options.lora_dir), *fused])],
        embeddings=[name.removesuffix(ENDING) for name in _files(options.embedding_dir)],
        controlnets=[net.name for net in manifest.controlnets],
        pictures=pictures,
    )


def _files(folder: Path | None) -> list[str]:
    """Return the files of a folder and its sub-folders, by their paths from it, without following links."""
    found: list[str] = []
    for root, _, files in os.walk(folder) if folder is not None else ():
        found += [str(PurePosixPath(Path(root, name).relative_to(folder).as_posix())) for name in files  # type: ignore[arg-type]
                  if name.endswith(ENDING) and not Path(root, name).is_symlink()]  # fmt: skip
        if len(found) >= MOST_FILES:
            break
    return sorted(found[:MOST_FILES])


def folders(names: Names) -> dict[str, Sequence[str]]:
    """Return what /models lists, by folder."""
    return {"checkpoints": names.checkpoints, "loras": names.loras, "vae": [], "embeddings": names.embeddings,
            "controlnet": names.controlnets, "diffusion_models": [], "upscale_models": []}  # fmt: skip


def object_info(names: Names, wanted: str | None = None) -> dict[str, Any]:
    """Return what the editor knows of every class, or of the one `wanted`; nothing for an unknown one."""
    known = {kind: _info(kind, NODES[kind], names) for kind in NODES if wanted in (None, kind)}
    shells = {kind: _about(kind, {"required": inputs}, ("MODEL",)) for kind, inputs in SHELLS.items()
              if wanted in (None, kind)}  # fmt: skip
    return known | shells


def _info(kind: str, node: NodeKind, names: Names) -> dict[str, Any]:
    inputs: dict[str, dict[str, Any]] = {"required": {}}
    for each in node.inputs:
        inputs.setdefault("optional" if each.optional else "required", {})[each.name] = _input(each, names)
    if kind in OUTPUTS:
        inputs["hidden"] = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
    return _about(kind, inputs, node.outputs)


def _about(kind: str, inputs: Mapping[str, Mapping[str, Any]], outputs: Sequence[str]) -> dict[str, Any]:
    return {
        "input": inputs, "input_order": {group: [*each] for group, each in inputs.items()}, "is_input_list": False,
        "output": [*outputs], "output_is_list": [False] * len(outputs), "output_name": [*outputs],
        "output_tooltips": [None] * len(outputs), "name": kind, "display_name": kind, "description": "",
        "python_module": "nodes", "category": "sdxl-trt", "output_node": kind in OUTPUTS,
        "has_intermediate_output": False, "search_aliases": [],
    }  # fmt: skip


def _input(each: Input, names: Names) -> list[Any]:
    """Return an input in the old form, a list whose first item is a type or the choices: clients know no other."""
    if each.is_link:
        return [each.type]
    options: dict[str, Any] = {} if each.required or each.default is None else {"default": each.default}
    menu = names.menus.get(each.name)
    if menu is not None:
        upload = {"image_upload": True} if each.name == "image" else {}
        return [[*menu], options | upload]
    if each.type == "CHOICE":
        return [[*each.choices], options]
    if each.type in ("INT", "FLOAT"):
        options |= {"min": each.low, "max": each.high}
        if each.type == "FLOAT":
            options["step"] = _STEPS.get(each.name, 0.01)
        if each.name in ("seed", "noise_seed"):
            options |= {"default": 0, "control_after_generate": True}
    if each.type == "STRING" and each.name.startswith("text"):
        options |= {"multiline": True, "dynamicPrompts": True}
    return [each.type, options]


def system_stats(provider: str, vram: int | None) -> dict[str, Any]:
    """Return what is known of the machine; no paths, and no arguments."""
    free = available_host_memory() or 0
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else free
    device = {"name": provider, "type": "cpu" if provider in ("ort-cpu", "openvino") else "cuda", "index": 0,
              "vram_total": vram or 0, "vram_free": vram or 0, "torch_vram_total": 0, "torch_vram_free": 0}  # fmt: skip
    system: dict[str, Any] = {"os": sys.platform, "ram_total": total, "ram_free": free, "comfyui_version": VERSION,
              "required_frontend_version": "", "python_version": platform.python_version(), "pytorch_version": "none",
              "embedded_python": False, "argv": []}  # fmt: skip
    return {"system": system, "devices": [device]}
