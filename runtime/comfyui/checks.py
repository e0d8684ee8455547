"""Check a workflow against a bundle: which expert replaces each checkpoint, and whether autoencoders match.

Checkpoint files are not read: the bundle's models replace them, with a warning if the names differ.
"""

__all__ = ["check_sampling", "check_sides", "experts", "names_tiny", "vae_stage", "warn_of_names"]

import logging
from collections.abc import Mapping
from pathlib import PurePosixPath

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import Manifest
from sdxl_trt.runtime.comfyui.workflow import TINY, Loaded, Sampling, VaeName, Workflow, ancestry, prompts_of
from sdxl_trt.runtime.diffusion.samplers import sampler_names
from sdxl_trt.runtime.diffusion.schedules import COMFYUI_SCHEDULES
from sdxl_trt.runtime.request import StageName, most_skipped

log = logging.getLogger("sdxl_trt.runtime")
Experts = Mapping[str, StageName]


def experts(workflow: Workflow, manifest: Manifest) -> Experts:
    """Return the bundle's expert that replaces each checkpoint a workflow samples with, by checkpoint name.

    The name, the text encode node or a start from a picture decides. If none does, the later of two checkpoints is the
    refiner, and a single one is the base. Raises UsageError for more checkpoints than experts, and for two of one kind.
    """
    found: dict[str, StageName | None] = {}
    for sampling in workflow.samplings:
        own = [each for each in workflow.samplings if each.model.checkpoint == sampling.model.checkpoint]
        found.setdefault(sampling.model.checkpoint, _deduced(sampling.model.checkpoint, own, workflow, manifest))
    named = [name[:60] for name in found]
    if len(found) > 2:
        raise UsageError(f"the workflow samples with {len(found)} checkpoints, {', '.join(map(repr, named[:4]))}; a"
                         " bundle has a base and a refiner")  # fmt: skip
    if len(found) == 1:
        ((name, expert),) = found.items()
        return {name: expert or "base"}
    (first, one), (second, other) = found.items()
    if one is not None and one == other:
        raise UsageError(f"the workflow samples with two checkpoints of one kind, {named[0]!r} and {named[1]!r}, both"
                         f" for the {one}; a bundle has one base and one refiner")  # fmt: skip
    if one == "refiner" or other == "base":
        return {first: "refiner", second: "base"}
    return {first: "base", second: "refiner"}


def _deduced(name: str, samplings: list[Sampling], workflow: Workflow, manifest: Manifest) -> StageName | None:
    """Return the expert that a checkpoint's name and use point to, or None if they do not decide."""
    stem = _stem(name)
    known = {_stem(model): stage for stage, model in _models(manifest).items()}
    if stem in known and len(known) == len(_models(manifest)):
        return known[stem]
    if "refiner" in stem:
        return "refiner"
    prompts = [each for sampling in samplings for each in prompts_of((*sampling.positive, *sampling.negative))]
    if "base" in stem or any(each.encoder == "CLIPTextEncodeSDXL" for each in prompts):
        return "base"
    alone = len({sampling.model.checkpoint for sampling in workflow.samplings}) == 1
    starts = [each for output in workflow.outputs for each in ancestry(output.image)[-1:]]
    if alone and any(each.score is not None for each in prompts) and all(isinstance(each, Loaded) for each in starts):
        return "refiner"
    return None


def _models(manifest: Manifest) -> dict[StageName, str]:
    """Return the source names of the bundle's models by stage."""
    stages: dict[StageName, str] = {}
    for name, stage in (("base", manifest.base), ("refiner", manifest.refiner)):
        component = None if stage is None else manifest.components.get(stage.unet)
        if component is not None:
            stages[name] = component.source.name.removesuffix("/unet")  # type: ignore[index]
    return stages


def _stem(name: str) -> str:
    """Return a file name for comparison: without its folder and extension, in lower case."""
    # ComfyUI gives paths relative to its models folder, with the separators of its operating system.
    return PurePosixPath(name.replace("\\", "/")).name.lower().removesuffix(".safetensors").removesuffix(".ckpt")


def warn_of_names(workflow: Workflow, found: Experts, manifest: Manifest) -> None:
    """Warn of each checkpoint that is replaced by a model of another name."""
    models = _models(manifest)
    lines: dict[str, None] = {}
    for sampling in workflow.samplings:
        name = sampling.model.checkpoint
        model = models.get(found[name])
        if model is not None and _stem(model) != _stem(name):
            lines[f"node {sampling.model.node[:20]} (CheckpointLoaderSimple): {name[:80]!r} is not read; the bundle's"
                  f" {found[name]}, {model!r}, is used instead"] = None  # fmt: skip
    for line in lines:
        log.warning("%s", line)


def check_sampling(sampling: Sampling, stage: StageName, manifest: Manifest) -> None:
    """Raise UsageError for settings of a sampler node that are not supported, or if the bundle lacks its model."""
    where = f"node {sampling.node}"
    known = sampler_names(comfyui=True)
    if sampling.sampler not in known:
        raise UsageError(f"{where}: sampler_name {sampling.sampler!r} is not supported; choose one of:"
                         f" {', '.join(known)}")  # fmt: skip
    if sampling.schedule not in COMFYUI_SCHEDULES:
        raise UsageError(f"{where}: scheduler {sampling.schedule!r} is not supported; choose one of:"
                         f" {', '.join(COMFYUI_SCHEDULES)}")  # fmt: skip
    if not 0.0 < sampling.denoise <= 1.0:
        raise UsageError(f"{where}: denoise {sampling.denoise:g} is outside 0 to 1; choose a value above 0, since 0"
                         " changes nothing")  # fmt: skip
    if stage == "refiner" and manifest.refiner is None:
        raise UsageError(f"{where}: needs a refiner, but the bundle has none; export it with --refiner SRC")


def check_sides(sampling: Sampling, found: Experts, manifest: Manifest) -> None:
    """Raise UsageError for a prompt encoded with another checkpoint's CLIP, or in a way its expert does not support."""
    own, most = sampling.model.checkpoint, most_skipped(manifest)
    for each in prompts_of((*sampling.positive, *sampling.negative)):
        if found[own] == "refiner" and each.controls:
            raise UsageError(f"node {each.controls[0].node}: applies a ControlNet to the refiner, but ControlNets are"
                             " for the base; link the prompt itself to the refiner's sampler")  # fmt: skip
        if each.clip.checkpoint not in ("", own):
            other = each.clip.checkpoint[:60]
            raise UsageError(f"node {each.node}: its CLIP comes from {other!r}, but node {sampling.node} samples with"
                             f" {own[:60]!r}; link that checkpoint's CLIP")  # fmt: skip
        if each.clip.last_layer < -2 - most:
            raise UsageError(f"node {each.node}: its CLIP stops at layer {each.clip.last_layer}, but the bundle's text"
                             f" encoders reach only {-2 - most}; choose -1 to {-2 - most}")  # fmt: skip
        if found[own] == "refiner" and each.encoder == "CLIPTextEncodeSDXL":
            raise UsageError(f"node {each.node} (CLIPTextEncodeSDXL): is for the base's two encoders, but node"
                             f" {sampling.node} samples with the refiner; use CLIPTextEncodeSDXLRefiner")  # fmt: skip


def names_tiny(vae: VaeName, manifest: Manifest) -> bool:
    """Return whether a VAELoader names the tiny decoder of SDXL's latents, and the bundle has one."""
    return vae.own_file and _stem(vae.name) == TINY and manifest.base.vae.tiny is not None


def vae_stage(vae: VaeName, found: Experts, otherwise: StageName, manifest: Manifest) -> StageName:
    """Return the stage whose autoencoder replaces `vae`: that of its checkpoint, or `otherwise` if no sampler uses it.

    A separate VAE file is not read; a warning states this unless the bundle was exported from it.
    """
    if not vae.own_file and vae.name in found:
        return found[vae.name]
    stage = manifest.refiner if otherwise == "refiner" and manifest.refiner is not None else manifest.base
    component = manifest.components.get(stage.vae.decoder)
    if component is not None:
        source = component.source.name
        ours = {_stem(source), _stem(source.removesuffix("/vae"))}
        if _stem(vae.name) not in ours:
            log.warning("node %s: the autoencoder %r is not read; the bundle's own, %s, is used instead", vae.node[:20],
                        vae.name[:80], source)  # fmt: skip
    return otherwise
