"""A ComfyUI workflow as a request: its first sampler is the base's, its second the refiner's.

Checkpoints are not looked for: the bundle takes their place, and what the workflow asks of it that it does not have, or
what cannot be run here, is named with its node.
"""

__all__ = ["workflow_request"]

import logging
import math
from dataclasses import replace
from pathlib import PurePosixPath

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.engines.manifest import Manifest
from sdxl_trt.runtime.comfy_schedules import COMFYUI_SCHEDULES, DISCARDING
from sdxl_trt.runtime.request import Request
from sdxl_trt.runtime.samplers import sampler_names
from sdxl_trt.runtime.sides import Side
from sdxl_trt.runtime.workflow import Conditioning, Sampling, Workflow

log = logging.getLogger("sdxl_trt.runtime")
_MOST_SAMPLERS = 2


def workflow_request(workflow: Workflow, manifest: Manifest) -> Request:
    """Return what `workflow` asks of a bundle with `manifest`. Raises UsageError that names what cannot be run."""
    base, *others = workflow.samplings
    if workflow.latents.image is not None:
        raise UsageError(f"node {workflow.latents.node} (VAEEncode): starting from a picture is not supported yet")
    if len(others) >= _MOST_SAMPLERS:
        raise UsageError(f"node {others[1].node}: is a sampler too many; base and refiner, in this order, can be run")
    for sampling in workflow.samplings:
        _check_sampling(sampling)
    _check_loras(base, manifest)
    alone = Request(
        base.positive.text_l,
        compat="comfyui",
        negative=base.negative.text_l,
        steps=base.steps,
        guidance=base.cfg,
        sampler=base.sampler,
        schedule=base.schedule,
        seed=base.seed,
        count=workflow.latents.batch,
        width=workflow.latents.width,
        height=workflow.latents.height,
        handoff=None,
        base_start_step=base.start,
        base_end_step=base.end,
        base_add_noise=base.add_noise,
        leftover_noise=base.leftover_noise,
        base_sides=_sides(base),
    )
    return _refined(alone, base, others[0], workflow.vae, manifest) if others else alone


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
        refiner_sides=_sides(refiner),
    )


def _check_sampling(sampling: Sampling) -> None:
    where = f"node {sampling.node}"
    known = sampler_names(comfyui=True)
    if sampling.sampler not in known:
        raise UsageError(f"{where}: sampler_name {sampling.sampler!r} is unknown here; choose one of:"
                         f" {', '.join(known)}")  # fmt: skip
    if sampling.schedule not in COMFYUI_SCHEDULES:
        raise UsageError(f"{where}: scheduler {sampling.schedule!r} is unknown here; choose one of:"
                         f" {', '.join(COMFYUI_SCHEDULES)}")  # fmt: skip
    if not math.isclose(sampling.denoise, 1.0, abs_tol=1e-4):
        raise UsageError(f"{where}: denoise {sampling.denoise:g} is not supported yet; 1 is, and KSamplerAdvanced with"
                         " start_at_step")  # fmt: skip


def _check_pair(base: Sampling, refiner: Sampling, vae: str, manifest: Manifest) -> None:
    """Raise UsageError for two samplings that one grid, one bundle and one change of experts cannot serve."""
    where = f"nodes {base.node} and {refiner.node}"
    if manifest.refiner is None:
        raise UsageError(f"node {refiner.node}: takes a refiner, but the bundle has none; export it with --refiner SRC")
    if base.model.checkpoint == refiner.model.checkpoint:
        raise UsageError(f"{where}: sample with one checkpoint twice; the second is to be the refiner's")
    if refiner.model.loras:
        raise UsageError(f"node {refiner.node}: has a LoRA on the refiner, which is not supported; take it off")
    for name in ("steps", "schedule"):
        one, other = getattr(base, name), getattr(refiner, name)
        if one != other:
            raise UsageError(f"{where}: {name} {one} and {other}; base and refiner share one grid: make them equal")
    # These leave out a sigma of a grid that is one step longer.
    if (base.sampler in DISCARDING) != (refiner.sampler in DISCARDING):
        raise UsageError(f"{where}: samplers {base.sampler} and {refiner.sampler} are on different grids; choose two of"
                         f" the same kind: {', '.join(sorted(DISCARDING))}, or two others")  # fmt: skip
    if vae == base.model.checkpoint and manifest.base.vae != manifest.refiner.vae:
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
