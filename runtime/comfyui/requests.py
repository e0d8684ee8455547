"""A ComfyUI workflow as requests: one for a base and a refiner that share a grid, else one for each of its samplers.

The bundle's models replace the checkpoints. Errors name the node that asks for what the bundle lacks or for what is not
supported.
"""

__all__ = [
    "PictureFiles",
    "blamed",
    "check_workflow",
    "load_channel",
    "load_image",
    "loaded_name",
    "pair_request",
    "part_of",
    "sampling_request",
    "settle_pair",
    "with_seed",
]

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import CorruptError, SizeError, UsageError
from sdxl_trt.engines.bundle import Bundle, Manifest
from sdxl_trt.engines.host import contained
from sdxl_trt.engines.plans import PlanLimits
from sdxl_trt.runtime.comfyui.checks import (
    Experts,
    check_sampling,
    check_sides,
    experts,
    names_tiny,
    vae_stage,
    warn_of_names,
)
from sdxl_trt.runtime.comfyui.controls import control_uses
from sdxl_trt.runtime.comfyui.loras import NO_FILES, LoraFiles, check_loras, side_loras, stage_loras
from sdxl_trt.runtime.comfyui.workflow import (
    Conditioning,
    Decoded,
    Empty,
    Encoded,
    LatentSource,
    Loaded,
    Mask,
    Repeated,
    Sampled,
    Sampling,
    Workflow,
    ancestry,
)
from sdxl_trt.runtime.images import InputPicture, read_channel, read_input
from sdxl_trt.runtime.request import Request, ResolvedRequest, Side, SideMix, StageName, resolve_request, settings_of

PictureFiles = Path | Mapping[str, Path]
"""Where LoadImage finds pictures: in a folder, or in a table of files by the names that a graph has for them."""
_OWN_SEEDS = ("seed", "noise_seed")
_FIELDS = {each.word: each.node for each in settings_of(Request).values() if each.node}
"""The names of the options' settings in ComfyUI's nodes."""


def check_workflow(workflow: Workflow, manifest: Manifest, files: LoraFiles = NO_FILES) -> Experts:
    """Check that a bundle has all that `workflow` needs, and return the expert that replaces each checkpoint.

    LoRAs that the bundle lacks are among `files`. Raises UsageError that names a node.
    """
    found = experts(workflow, manifest)
    for sampling in workflow.samplings:
        check_sampling(sampling, found[sampling.model.checkpoint], manifest)
        check_sides(sampling, found, manifest)
    check_loras(workflow.samplings, found, manifest, files)
    warn_of_names(workflow, found, manifest)
    return found


def pair_request(
    workflow: Workflow,
    manifest: Manifest,
    found: Experts,
    folder: PictureFiles | None = None,
    files: LoraFiles = NO_FILES,
) -> Request | None:
    """Return the single request that draws a workflow, or None if it needs several.

    A single request is one sampler, or a base's and then a refiner's on one grid, from empty latents or an unscaled
    picture to one picture. Pictures are loaded from `folder`, by default the working directory, or looked up in a
    table; LoRAs are among `files`. Raises UsageError.
    """
    files = files.beside(manifest)
    if len(workflow.outputs) > 1 or not isinstance(workflow.outputs[0].image, Decoded):
        return None
    decoded = workflow.outputs[0].image
    samplings, start = _samplings(decoded)
    stages = [found[sampling.model.checkpoint] for sampling in samplings]
    if stages not in (["base"], ["refiner"], ["base", "refiner"]) or not _fits(samplings):
        return None
    batch, source = _start(start)
    shown = any(each.shown is not None for each in samplings)
    if shown or not (isinstance(source, Empty) or (isinstance(source, Encoded) and _is_plain(source))):
        return None
    tiny = names_tiny(decoded.vae, manifest)
    decoder = stages[-1] if tiny else vae_stage(decoded.vae, found, stages[-1], manifest)
    encoder = stages[0] if isinstance(source, Empty) else vae_stage(source.vae, found, stages[0], manifest)
    own = {stage: manifest.stages()[stage].vae for stage in (*stages, decoder, encoder)}
    if own[decoder] != own[stages[-1]] or own[encoder] != own[stages[0]]:
        return None
    if isinstance(source, Empty) and stages == ["refiner"]:
        return None
    loaded = source.image if isinstance(source, Encoded) else None
    where = Path() if folder is None else folder
    image = load_image(loaded, where) if isinstance(loaded, Loaded) else None
    size = (source.height, source.width) if isinstance(source, Empty) else None
    names = tuple(sampling.model.checkpoint for sampling in samplings)
    request = replace(
        sampling_request(
            samplings[0],
            stages[0],
            files,
            manifest,
            lambda one: load_image(one, where),
            image=image,
            size=size,
            count=batch,
        ),
        checkpoints=names,
        vae="tiny" if tiny else "full",
        tile=decoded.tiled or (isinstance(source, Encoded) and source.tiled),
        graph=workflow.graph,
    )
    return _refined(request, samplings[0], samplings[1], files) if len(samplings) > 1 else request


def _is_plain(source: Encoded) -> bool:
    """Return whether latents are those of a whole picture as it is in its file."""
    return source.mask is None and isinstance(source.image, Loaded)


def _samplings(decoded: Decoded) -> tuple[list[Sampling], LatentSource]:
    """Return the chain of samplers that ends in `decoded`, in order, and the latents that the first starts from."""
    samplings: list[Sampling] = []
    latents = decoded.latents
    while isinstance(latents, Sampled):
        samplings.insert(0, latents.sampling)
        latents = latents.latents
    return samplings, latents


def _fits(samplings: Sequence[Sampling]) -> bool:
    """Return whether all samplers have the same number of steps and the same schedule."""
    return len({(each.steps, each.schedule) for each in samplings}) == 1


def _start(start: LatentSource) -> tuple[int, LatentSource]:
    """Return the number of pictures, and the latents that are repeated for them."""
    batch, source = 1, start
    while isinstance(source, Repeated):
        batch, source = batch * source.amount, source.latents
    if isinstance(source, Empty):
        batch *= source.batch
    return batch, source


def sampling_request(
    sampling: Sampling,
    stage: StageName,
    files: LoraFiles,
    manifest: Manifest,
    load: Callable[[Loaded], InputPicture],
    *,
    image: InputPicture | None,
    size: tuple[int, int] | None,
    count: int,
) -> Request:
    """Return the request of one sampler that starts from `image`, or from pure noise of `size` (height, width).

    `load` returns the pictures of its ControlNets, which are among those of `manifest`.
    Its LoRAs are among `files`, which know those that the base has fused (`LoraFiles.beside`).
    """
    sides = _sides(sampling, files.of(stage))
    loras = stage_loras(sampling, files.of(stage))
    alone = Request(
        sampling.positive[0].text_l,
        compat="comfyui",
        negative=sampling.negative[0].text_l,
        steps=sampling.steps,
        guidance=sampling.cfg,
        sampler=sampling.sampler,
        schedule=sampling.schedule,
        seed=sampling.seed,
        count=count,
        height=None if size is None else size[0],
        width=None if size is None else size[1],
        image=image,
        strength=sampling.denoise,
        handoff=None,
        base_start_step=sampling.start,
        base_end_step=sampling.end,
        base_add_noise=sampling.add_noise,
        leftover_noise=sampling.leftover_noise,
        base_sides=sides,
        checkpoints=(sampling.model.checkpoint,),
    )
    if stage == "base":
        return replace(alone, loras=loras, controls=control_uses(sampling, manifest, load))
    return replace(
        alone,
        refine=True,
        handoff="auto",
        base_end_step=None,
        leftover_noise=None,
        refiner_end_step=sampling.end,
        refiner_leftover_noise=sampling.leftover_noise,
        refiner_sides=sides,
        refiner_loras=loras,
    )


def _refined(alone: Request, base: Sampling, refiner: Sampling, files: LoraFiles) -> Request:
    files = files.of("refiner")
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
        refiner_sides=_sides(refiner, files),
        refiner_loras=stage_loras(refiner, files),
    )


def with_seed(request: Request, seed: int) -> Request:
    """Return a workflow's `request` with another seed, also for the refiner if it has a seed of its own."""
    graph = seeded(request.graph, seed)
    return replace(request, seed=seed, refiner_seed=None if request.refiner_seed is None else seed, graph=graph)


def seeded(graph: str, seed: int) -> str:
    """Return a graph's JSON with another seed in all its samplers."""
    if not graph:
        return graph
    nodes = json.loads(graph)
    for node in nodes.values():
        if node["class_type"] in ("KSampler", "KSamplerAdvanced"):
            node["inputs"] |= {name: seed for name in _OWN_SEEDS if name in node["inputs"]}
    return json.dumps(nodes)


def part_of(graph: Mapping[str, Any], end: str) -> dict[str, Any]:
    """Return node `end` of a graph in API form and all nodes that it needs, in the graph's order."""
    kept: set[str] = set()
    waiting = [end]
    while waiting:
        key = waiting.pop()
        if key in graph and key not in kept:
            kept.add(key)
            links = [value for value in graph[key]["inputs"].values() if isinstance(value, list) and len(value) == 2]
            waiting += [link[0] for link in links if isinstance(link[0], str)]
    return {key: node for key, node in graph.items() if key in kept}


def settle_pair(
    request: Request,
    workflow: Workflow,
    manifest: Manifest,
    limits: PlanLimits | None,
    bundle: Bundle | None = None,
    *,
    seed_given: bool,
) -> ResolvedRequest:
    """Return the single `request` of `workflow` resolved; raise UsageError that names a node if it cannot be.

    Takes the arguments of `resolve_request`, and raises what that raises.
    """
    try:
        return resolve_request(request, manifest, limits, bundle)
    except UsageError as exc:
        samplings, start = workflow.samplings, ancestry(workflow.outputs[0].image)[-1]
        ours = samplings[-1] if "refiner" in str(exc).partition(" ")[0] else samplings[0]
        raise blamed(exc, ours, getattr(start, "node", ""), seed_given=seed_given) from exc


def blamed(exc: UsageError, sampling: Sampling, start: str, *, seed_given: bool) -> UsageError:
    """Return the error `exc` of a request, naming the node that states the setting instead of an option not given.

    `start` is the node that states the size and the number of pictures.
    """
    message = str(exc)
    match = re.match(r"(--[a-z-]+|-n)\b", message)
    if match is None or match[1] not in _FIELDS or (match[1] == "--seed" and seed_given):
        return exc
    node = start if match[1] in ("--width", "--height", "-n") else sampling.node
    kind = SizeError if isinstance(exc, SizeError) else UsageError
    return kind(f"node {node}: {_FIELDS[match[1]]}{message[match.end() :]}")


def loaded_name(file: str) -> str:
    """Return the name of a picture without ComfyUI's mark of the folder that it is in, and without sub-folders."""
    return PurePosixPath(_unmarked(file)).name


def load_image(loaded: Loaded, folder: PictureFiles) -> InputPicture:
    """Return the picture of a LoadImage node, a file in the workflow's folder or below it, or one of a table."""
    where = f"node {loaded.node} (LoadImage)"
    path = _path(loaded.file, folder, where)
    picture = read_input(path, where)
    if picture.pixels is None:
        raise UsageError(f"{where}: {loaded.file[:80]!r} is not a picture; give a PNG, JPEG, WebP, GIF or BMP")
    # The files of a table have names of their own, which say nothing to anybody.
    return picture if isinstance(folder, Path) else replace(picture, name=loaded_name(loaded.file))


def load_channel(mask: Mask, folder: PictureFiles, without: tuple[int, int]) -> tuple[NDArray[np.float32], Path]:
    """Return the mask (h, w), from 0 to 1, of a node that names a file, and the file's path.

    The mask is a channel, the transparency inverted.

    LoadImage's mask of a picture without transparency is black and of the size `without`.
    """
    kind = "LoadImage" if mask.kind == "loaded" else "LoadImageMask"
    where = f"node {mask.node} ({kind})"
    path = _path(mask.file, folder, where)
    values = read_channel(path, where, mask.channel or "alpha")
    if values is None:
        size = without if mask.kind == "loaded" else read_input(path, where).size
        return np.zeros(size or without, np.float32), path
    found = values.astype(np.float32) / np.float32(255.0)
    return (found if mask.channel in ("red", "green", "blue") else np.float32(1.0) - found), path


def _unmarked(file: str) -> str:
    # ComfyUI marks which of its folders a file is in, and uses the separators of its operating system.
    return re.sub(r" \[(input|output|temp)\]$", "", file).replace("\\", "/")


def _path(file: str, folder: PictureFiles, where: str) -> Path:
    if not isinstance(folder, Path):
        if file not in folder:
            raise UsageError(f"{where}: there is no picture {file[:80]!r}; upload it first")
        return folder[file]
    name = _unmarked(file)
    try:
        path = contained(folder, name)
    except CorruptError as exc:
        raise UsageError(f"{where}: {name[:80]!r} is not a plain file name in the workflow's folder") from exc
    if not path.is_file():
        raise UsageError(f"{where}: {name[:80]!r} is not in the workflow's folder; put it into {folder}")
    return path


def _sides(sampling: Sampling, files: LoraFiles) -> tuple[Side, Side]:
    def side(conditionings: Sequence[Conditioning]) -> Side:
        first, *others = (_one_side(each, sampling, files) for each in conditionings)
        return replace(first, combined=tuple(others))

    return side(sampling.positive), side(sampling.negative)


def _one_side(prompt: Conditioning, sampling: Sampling, files: LoraFiles) -> Side:
    zeroed = [mix.kind for mix in prompt.mixes] == ["zero"]
    mixes = tuple(
        SideMix(
            kind=mix.kind,
            strength=mix.strength,
            other=None if mix.other is None else _one_side(mix.other, sampling, files),
        )
        for mix in prompt.mixes
    )
    return Side(
        text=prompt.text_l,
        text_2=prompt.text_g,
        zeroed=zeroed,
        clip_skip=-2 - prompt.clip.last_layer,
        loras=side_loras(prompt, sampling, files),
        mixes=() if zeroed else mixes,
        original_size=prompt.original_size,
        crop=prompt.crop,
        target_size=prompt.target_size,
        aesthetic_score=prompt.score,
    )
