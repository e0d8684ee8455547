"""A ComfyUI workflow as a request: its first sampler is the base's, its second the refiner's.

Checkpoints are not looked for: the bundle takes their place, and what the workflow asks of it that it does not have, or
what cannot be run here, is named with its node.
"""

__all__ = ["with_seed", "workflow_request"]

import logging
import math
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath

from sdxl_trt.engines.errors import CorruptError, UsageError
from sdxl_trt.engines.files import contained
from sdxl_trt.engines.manifest import Manifest
from sdxl_trt.runtime.comfy_schedules import COMFYUI_SCHEDULES, DISCARDING
from sdxl_trt.runtime.input_pictures import InputPicture, read_input
from sdxl_trt.runtime.request import Request
from sdxl_trt.runtime.samplers import sampler_names
from sdxl_trt.runtime.sides import Side
from sdxl_trt.runtime.workflow import Conditioning, Latents, Sampling, Workflow

log = logging.getLogger("sdxl_trt.runtime")
_MOST_SAMPLERS = 2


def workflow_request(workflow: Workflow, manifest: Manifest, folder: Path | None = None) -> Request:
    """Return what `workflow` asks of a bundle with `manifest`; pictures that it loads lie in `folder`, by default here.

    Raises UsageError that names what cannot be run.
    """
    base, *others = workflow.samplings
    if len(others) >= _MOST_SAMPLERS:
        raise UsageError(f"node {others[1].node}: is a sampler too many; base and refiner, in this order, can be run")
    for sampling in workflow.samplings:
        _check_sampling(sampling)
    _check_loras(base, manifest)
    latents, image = workflow.latents, None
    if latents.image is not None:
        _check_encoder(latents, base, manifest)
        image = _load(latents, folder or Path())
    alone = Request(
        base.positive.text_l,
        compat="comfyui",
        negative=base.negative.text_l,
        steps=base.steps,
        guidance=base.cfg,
        sampler=base.sampler,
        schedule=base.schedule,
        seed=base.seed,
        count=latents.batch,
        width=None if image else latents.width,
        height=None if image else latents.height,
        image=image,
        strength=base.denoise,
        handoff=None,
        base_start_step=base.start,
        base_end_step=base.end,
        base_add_noise=base.add_noise,
        leftover_noise=base.leftover_noise,
        base_sides=_sides(base),
        checkpoints=tuple(sampling.model.checkpoint for sampling in workflow.samplings),
    )
    if others:
        return _refined(alone, base, others[0], workflow.vae, manifest)
    # Told an aesthetic score, one sampler that starts from a picture is the refiner's.
    return alone if image is None or base.positive.score is None else _refining(alone, base, manifest)


def with_seed(request: Request, seed: int) -> Request:
    """Return a workflow's `request` with another seed, which is its refiner's too where that has one."""
    return replace(request, seed=seed, refiner_seed=None if request.refiner_seed is None else seed)


def _refined(alone: Request, base: Sampling, refiner: Sampling, vae: str, manifest: Manifest) -> Request:
    """Return the base's request with the refiner's sampling added."""
    _check_pair(base, refiner, vae, manifest)
    return replace(
        alone,
        handoff="auto",
        refiner_start_step=refiner.start,
        refiner_end_step=refiner.end,
        refiner_add_noise=refiner.add_noise,
        refiner_leftover_noise=refiner.leftover_noise,
        refiner_guidance=refiner.cfg,
        refiner_sampler=refiner.sampler,
        refiner_seed=refiner.seed,
        refiner_strength=None if base.denoise == refiner.denoise == 1.0 else refiner.denoise,
        refiner_sides=_sides(refiner),
    )


def _refining(alone: Request, refiner: Sampling, manifest: Manifest) -> Request:
    """Return the request of a picture that the refiner alone changes."""
    _check_refiner(refiner, manifest)
    return replace(
        alone,
        refine=True,
        handoff="auto",
        base_end_step=None,
        leftover_noise=None,
        refiner_end_step=refiner.end,
        refiner_leftover_noise=refiner.leftover_noise,
        refiner_sides=_sides(refiner),
    )


def _check_refiner(refiner: Sampling, manifest: Manifest) -> None:
    if manifest.refiner is None:
        raise UsageError(f"node {refiner.node}: takes a refiner, but the bundle has none; export it with --refiner SRC")
    if refiner.model.loras:
        raise UsageError(f"node {refiner.node}: has a LoRA on the refiner, which is not supported; take it off")


def _check_sampling(sampling: Sampling) -> None:
    where = f"node {sampling.node}"
    known = sampler_names(comfyui=True)
    if sampling.sampler not in known:
        raise UsageError(f"{where}: sampler_name {sampling.sampler!r} is unknown here; choose one of:"
                         f" {', '.join(known)}")  # fmt: skip
    if sampling.schedule not in COMFYUI_SCHEDULES:
        raise UsageError(f"{where}: scheduler {sampling.schedule!r} is unknown here; choose one of:"
                         f" {', '.join(COMFYUI_SCHEDULES)}")  # fmt: skip
    if not 0.0 < sampling.denoise <= 1.0:
        raise UsageError(f"{where}: denoise {sampling.denoise:g} is outside 0 to 1; choose above 0, which would change"
                         " nothing")  # fmt: skip


def _check_encoder(latents: Latents, base: Sampling, manifest: Manifest) -> None:
    """Raise UsageError for a picture that another autoencoder encodes than that of the sampler that starts from it."""
    stages = list(manifest.stages().values())
    if latents.vae != base.model.checkpoint and any(stage.vae != stages[0].vae for stage in stages):
        raise UsageError(f"node {latents.node} (LoadImage): is encoded with another checkpoint's VAE than the one that"
                         " samples first, and the bundle's differ: link the VAEEncode to that")  # fmt: skip


def _load(latents: Latents, folder: Path) -> InputPicture:
    """Return the picture of a LoadImage node, which lies in the workflow's folder, or below it."""
    where = f"node {latents.node} (LoadImage)"
    # ComfyUI says which of its folders a file is in; separators are those of its system.
    name = re.sub(r" \[(input|output|temp)\]$", "", latents.image or "").replace("\\", "/")
    try:
        path = contained(folder, name)
    except CorruptError as exc:
        raise UsageError(f"{where}: {name[:80]!r} is no plain name of a file in the workflow's folder") from exc
    if not path.is_file():
        raise UsageError(f"{where}: {name[:80]!r} is not in the workflow's folder; put it into {folder}")
    picture = read_input(path, where)
    if picture.pixels is None:
        raise UsageError(f"{where}: {name[:80]!r} is no picture; give a PNG, JPEG or WebP")
    return picture


def _check_pair(base: Sampling, refiner: Sampling, vae: str, manifest: Manifest) -> None:
    """Raise UsageError for two samplings that one grid, one bundle and one change of experts cannot serve."""
    where = f"nodes {base.node} and {refiner.node}"
    _check_refiner(refiner, manifest)
    if base.model.checkpoint == refiner.model.checkpoint:
        raise UsageError(f"{where}: sample with one checkpoint twice; the second is to be the refiner's")
    for name in ("steps", "schedule"):
        one, other = getattr(base, name), getattr(refiner, name)
        if one != other:
            raise UsageError(f"{where}: {name} {one} and {other}; base and refiner share one grid: make them equal")
    # These leave out a sigma of a grid that is one step longer.
    if (base.sampler in DISCARDING) != (refiner.sampler in DISCARDING):
        raise UsageError(f"{where}: samplers {base.sampler} and {refiner.sampler} are on different grids; choose two of"
                         f" the same kind: {', '.join(sorted(DISCARDING))}, or two others")  # fmt: skip
    if vae == base.model.checkpoint and manifest.refiner and manifest.base.vae != manifest.refiner.vae:
        raise UsageError("the workflow decodes with the base's VAE, and the bundle's refiner has another one: link the"
                         " VAEDecode to the refiner's checkpoint")  # fmt: skip


def _check_loras(base: Sampling, manifest: Manifest) -> None:
    """Raise UsageError for a LoRA that is not in the bundle; warn of one that only the bundle has."""
    fused = [(record.name, record.scale) for record in manifest.loras]
    for name, strength in base.model.loras:
        # ComfyUI names a file below its folder of LoRAs, with the separators of its system.
        file = PurePosixPath(name.replace("\\", "/")).name
        found = next((each for each in fused if each[0] == file and math.isclose(each[1], strength)), None)
        if found is None:
            raise UsageError(f"node {base.node}: LoRA {file} at strength {strength:g} is not in the bundle; export one"
                             f" with it: export-engines --lora {file}:{strength:g}")  # fmt: skip
        fused.remove(found)
    for name, strength in fused:
        log.warning("the bundle has LoRA %s at strength %g, which the workflow does not name", name, strength)


def _sides(sampling: Sampling) -> tuple[Side, Side]:
    return _side(sampling.positive), _side(sampling.negative)


def _side(told: Conditioning) -> Side:
    return Side(
        text=told.text_l,
        text_2=told.text_g,
        zeroed=told.zeroed,
        original_size=told.original_size,
        crop=told.crop,
        target_size=told.target_size,
        aesthetic_score=told.score,
    )
