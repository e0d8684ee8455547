"""Read a graph into a Workflow: follow every link, and check every input against the table of nodes."""

__all__ = ["read_workflow", "workflow_of"]

import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sdxl_trt.engines import UsageError
from sdxl_trt.runtime.comfyui.graph import Graph, graph_of, read_graph
from sdxl_trt.runtime.comfyui.node import IncompleteError, Link, Node, incomplete, whole
from sdxl_trt.runtime.comfyui.nodes import DRAWN, NODES, SHOWN, linked, stated, undeclared
from sdxl_trt.runtime.comfyui.values import SIDES, margins_of, mixed, prompt_count, read_prompt, sampled_part, scaling
from sdxl_trt.runtime.comfyui.workflow import (
    Clip,
    Conditioning,
    ControlHint,
    Decoded,
    Empty,
    Encoded,
    Image,
    LatentSource,
    Loaded,
    LoraNode,
    Mask,
    Masked,
    Mix,
    Model,
    Output,
    Padded,
    Repeated,
    Resized,
    Sampled,
    Sampling,
    Scaled,
    VaeName,
    Workflow,
    ancestry,
)

log = logging.getLogger("sdxl_trt.runtime")
Found = TypeVar("Found")
_MOST_OUTPUTS = 64
_MOST_NAMED = 20
_DEEPEST = 100
"""The most links in a row: Python's stack holds a few hundred calls."""
_MOST_PROMPTS = 16
"""The most prompts that one side of a sampler may be mixed or combined from."""
_RANDOM_CHOICE = re.compile(r"(?<!\\)\{[^{}]*\|[^{}]*\}")


def read_workflow(path: Path) -> Workflow:
    """Return the workflow in a JSON or picture file.

    Raises UsageError that names every node that is not supported and every input that is missing.
    """
    graph = read_graph(path)
    reader = _Reader(graph)
    outputs = _ends(graph, f"--workflow {path}")
    drawn, problems = _read_outputs(reader, outputs)
    if not drawn:
        every = [*dict.fromkeys(problem for each in problems.values() for problem in each)]
        more = ["and more"] if len(every) > _MOST_NAMED else []
        raise UsageError(f"--workflow {path}: " + "; ".join(every[:_MOST_NAMED] + more))
    kept = _kept(drawn, {node.id: node for node in outputs})
    for node in outputs:
        if problems[node.id]:
            log.warning("%s: is not drawn: %s", node, "; ".join([*problems[node.id]][:_MOST_NAMED]))
        elif all(output.node != node.id for output in kept):
            log.warning("%s: is not drawn: %s", node, "another one saves the same picture" if node.kind == DRAWN else
                        "it is a preview, and other pictures are saved; replace it with a SaveImage")  # fmt: skip
    reader.warn(kept)
    return Workflow(tuple(kept), json.dumps(graph.api(output.node for output in kept)))


def workflow_of(
    nodes: Mapping[str, Any], where: str, ends: Collection[str] | None = None
) -> tuple[Workflow | None, Mapping[str, Sequence[str]]]:
    """Return the workflow of a graph in API form, and what is wrong with each SaveImage and PreviewImage, by its id.

    All pictures that can be drawn are outputs, saved or previewed, or only those of the nodes `ends`; None if there are
    none. A node that shows the picture of another one is among its `copies`. `where` names the graph in messages.
    Raises UsageError if the graph is none, or shows no picture at all.
    """
    graph = graph_of(nodes, where)
    reader = _Reader(graph)
    outputs = [node for node in _ends(graph, where) if ends is None or node.id in ends]
    drawn, problems = _read_outputs(reader, sorted(outputs, key=lambda node: node.kind != DRAWN))
    found = {node: [*each][:_MOST_NAMED] for node, each in problems.items() if each}
    if not drawn:
        return None, found
    reader.warn(drawn)
    firsts: dict[Image, str] = {}
    for output in drawn:
        firsts.setdefault(output.image, output.node)
    kept = sorted(
        (each for each in drawn if firsts[each.image] == each.node), key=lambda each: [*nodes].index(each.node)
    )
    copies = {output.node: firsts[output.image] for output in drawn if firsts[output.image] != output.node}
    return Workflow(tuple(kept), json.dumps(graph.api(output.node for output in drawn)), copies), found


def _ends(graph: Graph, where: str) -> list[Node]:
    """Return the nodes that show pictures."""
    outputs = [node for node in graph.nodes.values() if node.kind in (DRAWN, SHOWN)]
    if not outputs:
        raise UsageError(f"{where}: has no SaveImage or PreviewImage; add one")
    if len(outputs) > _MOST_OUTPUTS:
        raise UsageError(f"{where}: saves and previews {len(outputs)} pictures; keep one SaveImage")
    return outputs


def _read_outputs(reader: "_Reader", nodes: Sequence[Node]) -> tuple[list[Output], dict[str, dict[str, None]]]:
    """Return the pictures of `nodes` that can be drawn, and the problems of each node by its id."""
    problems: dict[str, dict[str, None]] = {}
    drawn: list[Output] = []
    for node in nodes:
        with reader.noting(problems.setdefault(node.id, {})):
            found = reader.tried(lambda node=node: reader.output(node))  # type: ignore[misc]
        if found is not None and not problems[node.id]:
            drawn.append(found)
    return drawn, problems


def _kept(drawn: list[Output], nodes: dict[str, Node]) -> list[Output]:
    """Return the pictures to write, each once: those that are saved, or if there are none, the previews."""
    saved = [output for output in drawn if nodes[output.node].kind == DRAWN] or drawn
    return [output for i, output in enumerate(saved) if all(output.image != other.image for other in saved[:i])]


class _Reader:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._problems: dict[str, None] = {}
        self._known: dict[tuple[str, str, int], Any] = {}
        self._under_way: list[tuple[str, str, int]] = []
        self._used: dict[str, dict[str, None]] = {}
        """The nodes that each picture needs."""
        self._reading: dict[str, None] = {}

    @contextmanager
    def noting(self, problems: dict[str, None]) -> Iterator[None]:
        """Collect the problems found while reading in `problems`."""
        before, self._problems = self._problems, problems
        yield
        self._problems = before

    def tried(self, read: Callable[[], Found]) -> Found | None:
        """Return what `read` returns; if it raises UsageError, note the problem and return None."""
        try:
            return read()
        except IncompleteError:
            return None  # the cause has been noted
        except UsageError as exc:
            self._problems[str(exc)] = None
            return None

    def warn(self, outputs: list[Output]) -> None:
        """Warn of the ignored inputs of all nodes that `outputs` need."""
        for key in dict.fromkeys(key for output in outputs for key in self._used[output.node]):
            node = self._graph.nodes[key]
            for line in undeclared(node):
                log.warning("%s", line)
            for name, value in node.inputs.items():
                if name.startswith("text") and isinstance(value, str) and (found := _RANDOM_CHOICE.search(value)):
                    log.warning("%s: %s holds %s, from which ComfyUI's editor picks one at random; here it is literal"
                                " text: write one choice", node, name, found[0][:60])  # fmt: skip

    def output(self, node: Node) -> Output:
        """Return the picture of a SaveImage or PreviewImage."""
        self._reading = {node.id: None}
        self._used[node.id] = self._reading
        self._known.clear()  # so that every picture notes its own nodes and problems
        self._check_values(node)
        prefix = str(stated(node, "filename_prefix")) if node.kind == DRAWN else ""
        image = self._image(linked(node, "images"))
        if not any(isinstance(each, Sampled) for each in ancestry(image)):
            raise UsageError(f"{node}: shows a picture that no sampler made; link one that is sampled")
        return Output(image, prefix, node.id)

    def _read(self, link: Link, kind: str, readers: dict[str, Callable[[Node, int], Found]]) -> Found:
        """Return what the node that `link` comes from gives as `kind`. Each is read once; a circle is an error."""
        node = self._graph.node(link)
        key = (node.id, kind, link.slot)
        if key in self._known:
            return self._known[key]  # type: ignore[no-any-return]
        if key in self._under_way or len(self._under_way) >= _DEEPEST:
            raise UsageError(f"{node}: the links form a circle, or a chain of more than {_DEEPEST} nodes")
        known = NODES.get(node.kind)
        if known is None:
            raise UsageError(f"{node}: is not supported, where {kind} is expected; replace or remove it")
        if node.kind not in readers or not 0 <= link.slot < len(known.outputs) or known.outputs[link.slot] != kind:
            gives = " and ".join(known.outputs) or "nothing"
            raise UsageError(f"{node}: gives {gives}, but output {link.slot} is linked as {kind}; link another output")
        self._under_way.append(key)
        try:
            self._reading[node.id] = None
            self._check_values(node)
            found = readers[node.kind](node, link.slot)
        finally:
            self._under_way.pop()
        self._known[key] = found
        return found

    def _check_values(self, node: Node) -> None:
        """Raise UsageError for a value that is linked to a node that is not supported."""
        for each in NODES[node.kind].inputs:
            value = node.inputs.get(each.name)
            if isinstance(value, Link) and not each.is_link:
                giving = self._graph.node(value)
                raise UsageError(f"{giving}: is not supported, where a value for {each.name} of {node} is expected;"
                                 f" write the value into {each.name}")  # fmt: skip

    def _image(self, link: Link) -> Image:
        def scaled(node: Node, _: int) -> Image:
            return Scaled(self._image(linked(node, "image")), **scaling(node))

        def decoded(node: Node, _: int) -> Image:
            latents: LatentSource | None = self.tried(lambda: self._latents(linked(node, "samples")))
            vae = self._vae(linked(node, "vae"))
            if latents is None:
                raise incomplete(node)
            return Decoded(latents, vae, node.kind == "VAEDecodeTiled", node.id)

        found: Image = self._read(link, "IMAGE", {
            "LoadImage": lambda node, _: Loaded(stated(node, "image"), node.id), "ImageScale": scaled,
            "ImageScaleBy": scaled, "VAEDecode": decoded, "VAEDecodeTiled": decoded,
            "ImagePadForOutpaint": lambda node, _: self._padded(node),
        })  # fmt: skip
        return found

    def _padded(self, node: Node) -> Padded:
        return Padded(self._image(linked(node, "image")), margins_of(node), node.id)

    def _mask(self, link: Link) -> Mask:
        def from_mask(kind: Any, *names: str) -> Callable[[Node, int], Mask]:
            return lambda node, _: Mask(kind, self._mask(linked(node, "mask")),
                                        values=tuple(stated(node, name) for name in names), node=node.id)  # fmt: skip

        def solid(node: Node, _: int) -> Mask:
            values = tuple(stated(node, each) for each in ("value", "width", "height"))
            return Mask("solid", values=values, node=node.id)

        def channel(node: Node, _: int) -> Mask:
            return Mask("channel", image=self._unsampled(node, "image"), channel=stated(node, "channel"), node=node.id)

        def margins(node: Node, _: int) -> Mask:
            self._unsampled(node, "image")
            return Mask("margins", image=self._padded(node), values=(stated(node, "feathering"),), node=node.id)

        return self._read(link, "MASK", {
            "LoadImage": lambda node, _: Mask("loaded", file=stated(node, "image"), node=node.id),
            "LoadImageMask": lambda node, _: Mask("channel", file=stated(node, "image"),
                                                  channel=stated(node, "channel"), node=node.id),
            "ImageToMask": channel, "SolidMask": solid, "InvertMask": from_mask("inverted"),
            "GrowMask": from_mask("grown", "expand", "tapered_corners"),
            "FeatherMask": from_mask("feathered", *SIDES), "ImagePadForOutpaint": margins,
        })  # fmt: skip

    def _unsampled(self, node: Node, name: str) -> Image:
        """Return the image that feeds an input, which is made from a file alone."""
        image = self._image(linked(node, name))
        if any(isinstance(each, Sampled) for each in ancestry(image)):
            raise UsageError(f"{node}: its {name} is one that a sampler makes, and masks are made from loaded pictures"
                             " only; save it and load it")  # fmt: skip
        return image

    def _latents(self, link: Link) -> LatentSource:
        def empty(node: Node, _: int) -> LatentSource:
            return Empty(stated(node, "width"), stated(node, "height"), stated(node, "batch_size"), node.id)

        def encoded(node: Node, _: int) -> LatentSource:
            image: Image | None = self.tried(lambda: self._image(linked(node, "pixels")))
            vae = self._vae(linked(node, "vae"))
            if image is None:
                raise incomplete(node)
            return Encoded(image, vae, node.kind == "VAEEncodeTiled", node.id)

        def masked(node: Node, _: int) -> LatentSource:
            return Masked(self._latents(linked(node, "samples")), self._mask(linked(node, "mask")), node.id)

        def inpainted(node: Node, _: int) -> LatentSource:
            image, vae = self._image(linked(node, "pixels")), self._vae(linked(node, "vae"))
            mask, grow = self._mask(linked(node, "mask")), stated(node, "grow_mask_by")
            return Encoded(image, vae, mask=mask, grow=grow, node=node.id)

        def conditioned(node: Node, _: int) -> LatentSource:
            shown = self._shown(node)
            encoded = Encoded(shown.image, shown.vae, node=node.id)
            fitted = Mask("fitted", shown.mask, shown.image, node=node.id)
            return Masked(encoded, fitted, node.id) if stated(node, "noise_mask") else encoded

        def repeated(node: Node, _: int) -> LatentSource:
            return Repeated(self._latents(linked(node, "samples")), stated(node, "amount"), node.id)

        def resized(node: Node, _: int) -> LatentSource:
            return Resized(self._latents(linked(node, "samples")), **scaling(node))

        def sampled(node: Node, _: int) -> LatentSource:
            sampling = self.tried(lambda: self._sampling(node))
            latents = self._latents(linked(node, "latent_image"))
            return Sampled(latents, whole(sampling, node))

        found: LatentSource = self._read(link, "LATENT", {
            "EmptyLatentImage": empty, "VAEEncode": encoded, "VAEEncodeTiled": encoded, "RepeatLatentBatch": repeated,
            "LatentUpscale": resized, "LatentUpscaleBy": resized, "KSampler": sampled, "KSamplerAdvanced": sampled,
            "SetLatentNoiseMask": masked, "VAEEncodeForInpaint": inpainted, "InpaintModelConditioning": conditioned,
        })  # fmt: skip
        return found

    def _shown(self, node: Node) -> Encoded:
        """Return the masked picture of an InpaintModelConditioning."""
        image, vae = self._unsampled(node, "pixels"), self._vae(linked(node, "vae"))
        return Encoded(image, vae, mask=self._mask(linked(node, "mask")), node=node.id)

    def _sampling(self, node: Node) -> Sampling:
        advanced = node.kind == "KSamplerAdvanced"
        model = self.tried(lambda: self._model(linked(node, "model")))
        positive = self.tried(lambda: self._conditioning(linked(node, "positive")))
        negative = self.tried(lambda: self._conditioning(linked(node, "negative")))
        if len({each.shown for each in (*whole(positive, node), *whole(negative, node))}) > 1:
            raise UsageError(f"{node}: its prompts show an inpainting model different pictures, or only some of them;"
                             " link both outputs of one InpaintModelConditioning")  # fmt: skip
        part = sampled_part(node) if advanced else {"denoise": stated(node, "denoise")}
        return Sampling(
            node=node.id,
            model=whole(model, node),
            positive=whole(positive, node),
            negative=whole(negative, node),
            seed=stated(node, "noise_seed" if advanced else "seed"),
            steps=stated(node, "steps"),
            cfg=stated(node, "cfg"),
            sampler=stated(node, "sampler_name"),
            schedule=stated(node, "scheduler"),
            **part,
        )

    def _model(self, link: Link) -> Model:
        def lora(node: Node, _: int) -> Model:
            model = self._model(linked(node, "model"))
            added = LoraNode(stated(node, "lora_name"), stated(node, "strength_model"), node.id)
            return replace(model, loras=(*model.loras, added))

        return self._read(link, "MODEL", {
            "CheckpointLoaderSimple": lambda node, _: Model(stated(node, "ckpt_name"), node=node.id),
            "LoraLoader": lora, "LoraLoaderModelOnly": lora,
        })  # fmt: skip

    def _clip(self, link: Link) -> Clip:
        def lora(node: Node, _: int) -> Clip:
            clip = self._clip(linked(node, "clip"))
            added = LoraNode(stated(node, "lora_name"), stated(node, "strength_clip"), node.id)
            return replace(clip, loras=(*clip.loras, added))

        def last_layer(node: Node, _: int) -> Clip:
            return replace(self._clip(linked(node, "clip")), last_layer=stated(node, "stop_at_clip_layer"))

        return self._read(link, "CLIP", {
            "CheckpointLoaderSimple": lambda node, _: Clip(stated(node, "ckpt_name")),
            "LoraLoader": lora, "CLIPSetLastLayer": last_layer,
        })  # fmt: skip

    def _vae(self, link: Link) -> VaeName:
        return self._read(link, "VAE", {
            "CheckpointLoaderSimple": lambda node, _: VaeName(stated(node, "ckpt_name"), node=node.id),
            "VAELoader": lambda node, _: VaeName(stated(node, "vae_name"), own_file=True, node=node.id),
        })  # fmt: skip

    def _controlnet(self, link: Link) -> str:
        """Return the name of the ControlNet that a link carries."""
        return self._read(
            link, "CONTROL_NET", {"ControlNetLoader": lambda node, _: str(stated(node, "control_net_name"))}
        )

    def _conditioning(self, link: Link) -> tuple[Conditioning, ...]:
        """Return the conditionings that a link carries: several if they were combined."""

        def prompt(node: Node, _: int) -> tuple[Conditioning, ...]:
            clip = self.tried(lambda: self._clip(linked(node, "clip")))
            read = read_prompt(node)
            return (replace(read, clip=whole(clip, node)),)

        def zeroed(node: Node, _: int) -> tuple[Conditioning, ...]:
            return mixed(self._conditioning(linked(node, "conditioning")), Mix("zero"))

        def combined(node: Node, _: int) -> tuple[Conditioning, ...]:
            both = [self._conditioning(linked(node, f"conditioning_{number}")) for number in (1, 2)]
            return self._limited(node, (*both[0], *both[1]))

        def joined(node: Node, _: int) -> tuple[Conditioning, ...]:
            to = self._conditioning(linked(node, "conditioning_to"))
            first, *others = self._conditioning(linked(node, "conditioning_from"))
            if others:
                raise UsageError(f"{node}: conditioning_from carries several prompts, and ComfyUI uses only the first;"
                                 " link that one")  # fmt: skip
            averages = node.kind == "ConditioningAverage"
            strength = stated(node, "conditioning_to_strength") if averages else 1.0
            mix = Mix("average" if averages else "concat", first, strength)
            return self._limited(node, mixed(to, mix))

        def shown(node: Node, slot: int) -> tuple[Conditioning, ...]:
            side = self._conditioning(linked(node, "negative" if slot else "positive"))
            picture = self._shown(node)
            return tuple(replace(each, shown=picture) for each in side)

        def controlled(node: Node, slot: int) -> tuple[Conditioning, ...]:
            advanced = node.kind == "ControlNetApplyAdvanced"
            name = ("positive", "negative")[slot] if advanced else "conditioning"
            side = self.tried(lambda: self._conditioning(linked(node, name)))
            net: str | None = self.tried(lambda: self._controlnet(linked(node, "control_net")))
            image: Image | None = self.tried(lambda: self._image(linked(node, "image")))
            if image is None:
                raise incomplete(node)
            hint = ControlHint(
                whole(net, node),
                image,
                stated(node, "strength"),
                stated(node, "start_percent") if advanced else 0.0,
                stated(node, "end_percent") if advanced else 1.0,
                both_sides=not advanced,
                node=node.id,
            )
            # As in ComfyUI, a strength of 0 applies nothing.
            added = (hint,) if hint.strength else ()
            return tuple(replace(each, controls=(*each.controls, *added)) for each in whole(side, node))

        return self._read(link, "CONDITIONING", {
            "InpaintModelConditioning": shown,
            **dict.fromkeys(("CLIPTextEncode", "CLIPTextEncodeSDXL", "CLIPTextEncodeSDXLRefiner"), prompt),
            "ControlNetApply": controlled, "ControlNetApplyAdvanced": controlled,
            "ConditioningZeroOut": zeroed, "ConditioningCombine": combined,
            "ConditioningConcat": joined, "ConditioningAverage": joined,
        })  # fmt: skip

    @staticmethod
    def _limited(node: Node, side: tuple[Conditioning, ...]) -> tuple[Conditioning, ...]:
        if sum(map(prompt_count, side)) > _MOST_PROMPTS:
            raise UsageError(f"{node}: mixes more than {_MOST_PROMPTS} prompts; remove some")
        return side
