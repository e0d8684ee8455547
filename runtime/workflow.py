"""What a ComfyUI workflow of base and refiner asks for: its samplers in order, their prompts, models and latents.

Every node between the picture and the checkpoints is read; what cannot be run is named, node by node, in one error.
"""

__all__ = ["Conditioning", "Latents", "Model", "Sampling", "Workflow", "read_workflow"]

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.comfy_graph import Graph, Link, Node, read_graph

Found = TypeVar("Found")
_OUTPUTS = ("SaveImage", "PreviewImage")
_SAMPLERS = ("KSampler", "KSamplerAdvanced")
_LORAS = ("LoraLoader", "LoraLoaderModelOnly")
_MOST_SAMPLERS = 64
_MOST_OUTPUTS = 64
_MOST_NAMED = 20
# KSamplerAdvanced's own default for "to the end".
TO_THE_END = 10_000


@dataclass(frozen=True)
class Model:
    """A checkpoint by the name that the workflow gives it, and the LoRAs (name, strength) put on it in order."""

    checkpoint: str
    loras: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Conditioning:
    """A prompt as one of ComfyUI's encoders takes it. Sizes are (height, width), None where the latents give them.

    `zeroed` stands for ConditioningZeroOut; `score` is the refiner's aesthetic score, None for the base's encoders.
    """

    node: str
    text_g: str
    text_l: str
    zeroed: bool = False
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    score: float | None = None


@dataclass(frozen=True)
class Latents:
    """Where the first sampler starts: empty latents of a picture size, or a picture file that `vae` encodes.

    `vae` is the name of a checkpoint, as the workflow gives it.
    """

    width: int = 0
    height: int = 0
    batch: int = 1
    image: str | None = None
    vae: str = ""
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Sampling:
    """One KSampler or KSamplerAdvanced: a part of a schedule of `steps`, from `start` to `end`.

    `denoise` below 1 (KSampler's) takes the last part of a longer schedule.
    """

    node: str
    model: Model
    positive: Conditioning
    negative: Conditioning
    seed: int
    steps: int
    cfg: float
    sampler: str
    schedule: str
    add_noise: bool = True
    start: int = 0
    end: int = TO_THE_END
    leftover_noise: bool = False
    denoise: float = 1.0


@dataclass(frozen=True)
class Workflow:
    """A chain of samplings from `latents` to a picture that the checkpoint `vae` decodes."""

    latents: Latents
    samplings: tuple[Sampling, ...]
    vae: str

    @property
    def image(self) -> str | None:
        """Return the picture file that it starts from."""
        return self.latents.image


def read_workflow(path: Path) -> Workflow:
    """Return what the workflow in a JSON or PNG file asks for.

    Raises UsageError that names every node that cannot be run, or what is missing.
    """
    graph = read_graph(path)
    problems: dict[str, None] = {}
    outputs = [node for node in graph.nodes.values() if node.kind in _OUTPUTS]
    if not outputs:
        raise UsageError(f"--workflow {path}: has no SaveImage or PreviewImage; add one")
    if len(outputs) > _MOST_OUTPUTS:
        raise UsageError(f"--workflow {path}: saves and shows {len(outputs)} pictures; leave one SaveImage in it")
    reader = _Reader(graph, problems)
    read = [reader.tried(lambda node=node: reader.picture(node)) for node in outputs]  # type: ignore[misc]
    if problems:
        more = ["and more"] if len(problems) > _MOST_NAMED else []
        raise UsageError(f"--workflow {path}: " + "; ".join([*problems][:_MOST_NAMED] + more))
    found = list(dict.fromkeys(workflow for workflow in read if workflow is not None))
    if len(found) > 1:
        # The longest chain ends in the picture that was meant; previews show what it went through.
        found.sort(key=lambda workflow: -len(workflow.samplings))
        if any(each.samplings != found[0].samplings[: len(each.samplings)] for each in found):
            raise UsageError(f"--workflow {path}: makes {len(found)} different pictures; leave one SaveImage in it")
    return found[0]


class _Reader:
    def __init__(self, graph: Graph, problems: dict[str, None]) -> None:
        self._graph = graph
        self._problems = problems

    def tried(self, read: Callable[[], Found]) -> Found | None:
        """Return what `read` finds; note the problem and return None where it cannot."""
        try:
            return read()
        except UsageError as exc:
            self._problems[str(exc)] = None
            return None

    def picture(self, output: Node) -> Workflow | None:
        """Return the chain that ends in `output`."""
        decode = self._of(output.link("images"), "VAEDecode")
        vae = self.tried(lambda: self._of(decode.link("vae"), "CheckpointLoaderSimple").text("ckpt_name"))
        samplings: list[Sampling | None] = []
        node = self._graph.node(decode.link("samples"))
        seen: set[str] = set()
        while node.kind in _SAMPLERS:
            if node.id in seen or len(seen) >= _MOST_SAMPLERS:
                raise UsageError(f"{node}: the samplers go in a circle, or are more than {_MOST_SAMPLERS}")
            seen.add(node.id)
            sampler = node
            samplings.append(self.tried(lambda sampler=sampler: self._sampling(sampler)))  # type: ignore[misc]
            node = self._graph.node(node.link("latent_image"))
        latents = self.tried(lambda: self._latents(node))
        done = tuple(each for each in reversed(samplings) if each is not None)
        if not samplings:
            raise UsageError(f"{decode}: decodes latents that no sampler made")
        if latents is None or vae is None or len(done) < len(samplings):
            return None
        return Workflow(latents, done, vae)

    def _of(self, link: Link, *kinds: str) -> Node:
        node = self._graph.node(link)
        if node.kind not in kinds:
            raise UsageError(f"{node}: cannot be run here, where {' or '.join(kinds)} is expected")
        return node

    def _latents(self, node: Node) -> Latents:
        if node.kind == "EmptyLatentImage":
            return Latents(node.whole("width"), node.whole("height"), node.whole("batch_size", 1), node=node.id)
        if node.kind == "VAEEncode":
            image = self._of(node.link("pixels"), "LoadImage")
            vae = self._of(node.link("vae"), "CheckpointLoaderSimple").text("ckpt_name")
            return Latents(image=image.text("image"), vae=vae, node=image.id)
        if node.kind == "RepeatLatentBatch":
            one = self._latents(self._of(node.link("samples"), "EmptyLatentImage", "VAEEncode"))
            return replace(one, batch=one.batch * node.whole("amount", 1))
        raise UsageError(f"{node}: cannot be run here, where a sampler, EmptyLatentImage or VAEEncode is expected")

    def _sampling(self, node: Node) -> Sampling:
        advanced = node.kind == "KSamplerAdvanced"
        model = self.tried(lambda: self._model(node.link("model")))
        positive = self.tried(lambda: self._conditioning(node.link("positive")))
        negative = self.tried(lambda: self._conditioning(node.link("negative")))
        part = self._part(node) if advanced else {"denoise": node.number("denoise", 1.0)}
        if model is None or positive is None or negative is None:
            raise UsageError(f"{node}: cannot be run without the nodes that are named here")
        return Sampling(
            node=node.id,
            model=model,
            positive=positive,
            negative=negative,
            seed=node.whole("noise_seed" if advanced else "seed"),
            steps=node.whole("steps"),
            cfg=node.number("cfg"),
            sampler=node.text("sampler_name"),
            schedule=node.text("scheduler"),
            **part,
        )

    @staticmethod
    def _part(node: Node) -> dict[str, float | bool]:
        return {
            "add_noise": _switch(node, "add_noise", "enable"),
            "start": node.whole("start_at_step", 0),
            "end": node.whole("end_at_step", TO_THE_END),
            "leftover_noise": _switch(node, "return_with_leftover_noise", "disable"),
        }

    def _model(self, link: Link) -> Model:
        """Follow LoRA loaders to the checkpoint."""
        loras: list[tuple[str, float]] = []
        seen: set[str] = set()
        node = self._of(link, "CheckpointLoaderSimple", *_LORAS)
        while node.kind in _LORAS:
            if node.id in seen:
                raise UsageError(f"{node}: the LoRA loaders go in a circle")
            seen.add(node.id)
            loras.append((node.text("lora_name"), node.number("strength_model")))
            node = self._of(node.link("model"), "CheckpointLoaderSimple", *_LORAS)
        return Model(node.text("ckpt_name"), tuple(reversed(loras)))

    def _conditioning(self, link: Link) -> Conditioning:
        kinds = ("CLIPTextEncode", "CLIPTextEncodeSDXL", "CLIPTextEncodeSDXLRefiner", "ConditioningZeroOut")
        node = self._of(link, *kinds)
        if node.kind == "ConditioningZeroOut":
            inner = self._of(node.link("conditioning"), *kinds[:3])
            return _prompt(inner, zeroed=True)
        return _prompt(node)


def _switch(node: Node, name: str, default: Literal["enable", "disable"]) -> bool:
    value = node.text(name, default)
    if value not in ("enable", "disable"):
        raise UsageError(f"{node}: {name} is neither enable nor disable")
    return value == "enable"


def _prompt(node: Node, *, zeroed: bool = False) -> Conditioning:
    if node.kind == "CLIPTextEncodeSDXL":
        return Conditioning(
            node=node.id,
            text_g=node.text("text_g"),
            text_l=node.text("text_l"),
            zeroed=zeroed,
            original_size=(node.whole("height"), node.whole("width")),
            crop=(node.whole("crop_h"), node.whole("crop_w")),
            target_size=(node.whole("target_height"), node.whole("target_width")),
        )
    text = node.text("text")
    if node.kind == "CLIPTextEncodeSDXLRefiner":
        size = (node.whole("height"), node.whole("width"))
        return Conditioning(node.id, text, text, zeroed, size, (0, 0), size, score=node.number("ascore"))
    return Conditioning(node.id, text, text, zeroed)
