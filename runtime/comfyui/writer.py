"""Write a request in ComfyUI mode as the graph that ComfyUI would run for it; `--workflow` and ComfyUI read it."""

__all__ = ["write_workflow"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import Manifest
from sdxl_trt.runtime.comfyui.node import Node
from sdxl_trt.runtime.comfyui.nodes import NODES, stated
from sdxl_trt.runtime.comfyui.workflow import TINY, TO_THE_END
from sdxl_trt.runtime.controls import Control
from sdxl_trt.runtime.images import InputMask, InputPicture
from sdxl_trt.runtime.request import Request, ResolvedRequest, ResolvedSide, StageName, StepRange, settings_of

Link = list[Any]


def write_workflow(asked: Request, request: ResolvedRequest, manifest: Manifest) -> dict[str, Any] | None:
    """Return the graph in API form of `asked`, resolved as `request`, or None if ComfyUI's nodes cannot express it.

    A request from a workflow may add guidance rescale and interval, a step cache, tiles and injected noise, which no
    node expresses.
    Checkpoints keep their names in the workflow, or else are named after the bundle's models. LoRAs are named by their
    paths in the request's folder of them, pictures by their own names; None too if two files would share a name.
    """
    stages = _stages(request)
    if not request.comfyui or not all(_fits_sampler_node(stage, asked, request) for stage in stages):
        return None
    fits = (_image_fits_nodes, _mask_fits_nodes, _controls_fit_nodes, _names_differ)
    if not _fits_nodes(asked) or not all(fit(request) for fit in fits):
        return None
    loras = _loras(asked, request, manifest)
    if loras is None:
        return None
    graph = _Graph()
    names = asked.checkpoints or _checkpoints(manifest)
    latents = ""
    for stage in stages:
        checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=names[0 if stage == "base" else -1])
        latents = latents or _start(graph, checkpoint, request)
        model = _Model(graph, checkpoint, loras[stage])
        latents = _sampler(graph, stage, model, latents, asked, request)
    vae = [graph.add("VAELoader", vae_name=TINY), 0] if request.request.vae == "tiny" else [checkpoint, 2]
    decoded = graph.add("VAEDecode", samples=[latents, 0], vae=vae)
    graph.add("SaveImage", images=[decoded, 0], filename_prefix="sdxl")
    return graph.nodes if all(_is_accepted(node) for node in graph.nodes.values()) else None


def _loras(
    asked: Request, request: ResolvedRequest, manifest: Manifest
) -> dict[StageName, list[tuple[str, float, float]]] | None:
    """Return the name and both strengths of every stage's LoRAs, the fused first; None if a name has two meanings.

    A node names a file by its path in the folder of LoRAs, and one that is not in there by its own name.
    """
    meant: dict[str, str] = {}
    told: dict[StageName, list[tuple[str, float, float]]] = {}
    for stage in _stages(request):
        fused = [(each.name, each.sha256, (each.scale, each.encoder_scale)) for each in manifest.loras
                 if stage == "base"]  # fmt: skip
        own = [(_lora_name(each.lora.path, asked.lora_dir), each.lora.sha256, (each.scale, each.on("text_encoder")))
               for each in request.loras.get(stage, ())]  # fmt: skip
        for name, sha256, _ in (*fused, *own):
            if not name or meant.setdefault(name, sha256) != sha256:
                return None
        told[stage] = [(name, *scales) for name, _, scales in (*fused, *own)]
    return told


def _lora_name(path: Path, folder: Path | None) -> str:
    """Return what a LoraLoader calls the file `path`; "" if that is the name of another file in `folder`."""
    if folder is None:
        return path.name
    whole, root = path.absolute(), folder.absolute()
    if whole.is_relative_to(root) and ".." not in (inner := whole.relative_to(root)).parts:
        return inner.as_posix()
    return "" if (folder / path.name).exists() else path.name


def _is_accepted(stored: Mapping[str, Any]) -> bool:
    """Return whether ComfyUI accepts every value of a node."""
    node = Node("", stored["class_type"], stored["inputs"])
    try:
        for each in NODES[node.kind].inputs:
            if not each.is_link:
                stated(node, each.name)
    except UsageError:
        return False
    return True


@dataclass(frozen=True)
class _Graph:
    nodes: dict[str, Any] = field(default_factory=dict)

    def add(self, kind: str, **inputs: Any) -> str:
        """Add a node and return its id."""
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": kind, "inputs": inputs}
        return number


class _Model:
    """The links to a checkpoint's UNet and text encoders, after its loaders of LoRAs: (name, and both strengths)."""

    def __init__(self, graph: _Graph, checkpoint: str, loras: Sequence[tuple[str, float, float]]) -> None:
        self.unet: Link = [checkpoint, 0]
        self.clip: Link = [checkpoint, 1]
        for name, scale, text_scale in loras:
            strengths = {"strength_model": scale, "strength_clip": text_scale}
            loader = graph.add("LoraLoader", lora_name=name, **strengths, model=self.unet, clip=self.clip)
            self.unet, self.clip = [loader, 0], [loader, 1]


def _stages(request: ResolvedRequest) -> tuple[StageName, ...]:
    if request.refiner_only:
        return ("refiner",)
    return ("base", "refiner") if request.uses_refiner else ("base",)


def _fits_nodes(asked: Request) -> bool:
    """Return whether a request has only settings that nodes have; one that comes from a graph always passes."""
    # A folder in which names are looked up is no setting of a picture: the names are in the graph.
    without = [each for each in settings_of(Request).values()
               if each.workflow in ("beside", "reads") and each.record != "no"]  # fmt: skip
    return all(each.is_default(getattr(asked, each.name)) for each in without) or asked.base_sides is not None


def _fits_sampler_node(stage: StageName, asked: Request, request: ResolvedRequest) -> bool:
    """Return whether ComfyUI's nodes can express all that a stage's sampler does."""
    part = request.denoising_of(stage)[1]
    strength = _strength(stage, asked, request)
    whole = part.start == 0 and part.stop == request.schedule_of(stage).steps
    if strength < 1.0 and not (whole and _adds_noise(stage, request)):
        return False
    if not all(side.is_plain and side.prompt.clip_skip == 0 for side in request.sides[stage]):
        return False
    if any(side.prompt.loras is not None for side in request.sides[stage]):
        return False
    if stage == "base":
        return True
    # In a graph, two samplers cannot share the grid that a strength below 1 makes, and the refiner has no crop.
    shares = not request.refiner_only and asked.refiner_strength is None and request.strength < 1.0
    return not shares and all(side.micro.crop == (0, 0) for side in request.sides[stage])


def _image_fits_nodes(request: ResolvedRequest) -> bool:
    """Return whether a run starts from pure noise, or from a picture file that ComfyUI would use unscaled."""
    image = request.image
    return image is None or (image.pixels is not None and image.name != "" and request.fit == "crop")


def _mask_fits_nodes(request: ResolvedRequest) -> bool:
    """Return whether ComfyUI would use a mask as it is used here.

    It has a file without colours, whose channels are all the mask; nothing is cut, outpainted or pasted; and the base
    is not an inpainting model, whose prompts a node of their own would have to change.
    """
    masking, image = request.masking, request.image
    if masking is None:
        return True
    source = masking.source
    whole = image is not None and image.size == (request.height, request.width)
    plain = source is not None and source.grey and source.name != "" and not any(request.request.outpaint)
    return whole and plain and not masking.paste and not request.takes_mask


def _controls_fit_nodes(request: ResolvedRequest) -> bool:
    """Return whether every ControlNet follows a picture file, on both sides."""
    return all(control.picture.name and control.use.side == "both" for control in request.controls)


def _names_differ(request: ResolvedRequest) -> bool:
    """Return whether each name of a picture, mask or ControlNet's picture means one file: a node has no folder."""
    found: list[InputPicture | InputMask] = [control.picture for control in request.controls]
    if request.image is not None:
        found.append(request.image)
    if request.masking is not None and request.masking.source is not None:
        found.append(request.masking.source)
    return len({(each.name, each.sha256) for each in found}) == len({each.name for each in found})


def _strength(stage: StageName, asked: Request, request: ResolvedRequest) -> float:
    own = stage == "refiner" and not request.refiner_only
    return (1.0 if asked.refiner_strength is None else asked.refiner_strength) if own else request.strength


def _adds_noise(stage: StageName, request: ResolvedRequest) -> bool:
    return request.first.add_noise if request.refiner_only else request.denoising_of(stage)[1].add_noise


def _checkpoints(manifest: Manifest) -> tuple[str, ...]:
    """Return checkpoint file names for the bundle's models, made from the names of their sources."""
    components = manifest.components
    names = [components[stage.unet].source.name.removesuffix("/unet") for stage in manifest.stages().values()]
    stems = [name.rsplit("/", 1)[-1].removesuffix(".safetensors") for name in names]
    if stems[0] == stems[-1]:
        # Two equal names would read as one checkpoint, not as base and refiner.
        stems[1:] = [f"{stem}-refiner" for stem in stems[1:]]
    return tuple(f"{stem}.safetensors" for stem in stems)


def _start(graph: _Graph, checkpoint: str, request: ResolvedRequest) -> str:
    """Add the nodes that the first sampler starts from, and return the last one's id."""
    count = len(request.seeds)
    if request.image is None:
        return graph.add("EmptyLatentImage", width=request.width, height=request.height, batch_size=count)
    loaded = graph.add("LoadImage", image=request.image.name)
    latents = graph.add("VAEEncode", pixels=[loaded, 0], vae=[checkpoint, 2])
    if count > 1:
        latents = graph.add("RepeatLatentBatch", samples=[latents, 0], amount=count)
    if request.masking is None or request.masking.source is None:
        return latents
    mask = graph.add("LoadImageMask", image=request.masking.source.name, channel="red")
    return graph.add("SetLatentNoiseMask", samples=[latents, 0], mask=[mask, 0])


def _sampler(
    graph: _Graph, stage: StageName, model: _Model, latents: str, asked: Request, request: ResolvedRequest
) -> str:
    """Add the nodes of a stage, and return its sampler's id."""
    positive, negative = request.sides[stage]
    sampler, part = request.denoising_of(stage)
    seed = ((request.refiner_seeds if stage == "refiner" else None) or request.seeds)[0]
    sides: list[Link] = [
        [_prompt(graph, stage, model.clip, positive, positive.micro.aesthetic_score), 0],
        [_prompt(graph, stage, model.clip, negative, negative.micro.negative_aesthetic_score), 0],
    ]
    for control in request.controls if stage == "base" else ():
        sides = _controlled(graph, control, sides)
    inputs = {
        "model": model.unet,
        "positive": sides[0],
        "negative": sides[1],
        "latent_image": [latents, 0],
        "steps": request.request.steps,
        "cfg": request.guidance_of(stage).scale,
        "sampler_name": sampler,
        "scheduler": request.request.schedule or "normal",
    }
    strength = _strength(stage, asked, request)
    if strength < 1.0:
        return graph.add("KSampler", **inputs, seed=seed, denoise=strength)
    noise = _switch(on=_adds_noise(stage, request))
    ends = _ends(part, request.schedule_of(stage).steps)
    return graph.add("KSamplerAdvanced", **inputs, noise_seed=seed, add_noise=noise, **ends)


def _controlled(graph: _Graph, control: Control, sides: list[Link]) -> list[Link]:
    """Add the nodes of a ControlNet, and return the links to both sides after it."""
    loader = graph.add("ControlNetLoader", control_net_name=f"{control.name}.safetensors")
    loaded = graph.add("LoadImage", image=control.picture.name)
    use = control.use
    node = graph.add("ControlNetApplyAdvanced", positive=sides[0], negative=sides[1], control_net=[loader, 0],
                     image=[loaded, 0], strength=use.scale, start_percent=use.start, end_percent=use.end)  # fmt: skip
    return [[node, 0], [node, 1]]


def _ends(part: StepRange, steps: int) -> Mapping[str, Any]:
    return {
        "start_at_step": part.start,
        "end_at_step": TO_THE_END if part.stop == steps else part.stop,
        "return_with_leftover_noise": _switch(on=part.leftover_noise and part.stop < steps),
    }


def _switch(*, on: bool) -> str:
    return "enable" if on else "disable"


def _prompt(graph: _Graph, stage: StageName, clip: Link, side: ResolvedSide, score: float) -> str:
    """Add the text encode node of one side of a stage, and return the id of the node that gives its conditioning."""
    height, width = side.micro.original_size
    size = {"width": width, "height": height}
    if stage == "refiner":
        node = graph.add("CLIPTextEncodeSDXLRefiner", ascore=score, **size, text=side.prompt.text, clip=clip)
    else:
        (top, left), (target_height, target_width) = side.micro.crop, side.micro.target_size
        target = {"crop_w": left, "crop_h": top, "target_width": target_width, "target_height": target_height}
        texts = {"text_g": side.prompt.text_2, "text_l": side.prompt.text}
        node = graph.add("CLIPTextEncodeSDXL", **size, **target, **texts, clip=clip)
    return graph.add("ConditioningZeroOut", conditioning=[node, 0]) if side.zeroed else node
