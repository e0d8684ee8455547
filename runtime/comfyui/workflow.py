"""A ComfyUI workflow as data: the pictures it draws, and the samplers, prompts, models and latents that make them.

Every link from a picture back to the checkpoints is followed. One error names all nodes that are not supported; if only
some pictures can be drawn, those are drawn and warnings name the others, as in ComfyUI.
"""

__all__ = [
    "TINY",
    "TO_THE_END",
    "Clip",
    "Conditioning",
    "ControlHint",
    "Decoded",
    "Empty",
    "Encoded",
    "Image",
    "LatentSource",
    "Loaded",
    "LoraNode",
    "Loras",
    "Mask",
    "Masked",
    "Mix",
    "Model",
    "Output",
    "Padded",
    "Repeated",
    "Resized",
    "Sampled",
    "Sampling",
    "Scaled",
    "VaeName",
    "Workflow",
    "ancestry",
    "mask_sources",
    "noise_mask",
    "prompts_of",
]

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

# KSamplerAdvanced's default end step, which means "to the end".
TINY = "taesdxl"
"""What ComfyUI's VAELoader calls the tiny autoencoder of SDXL's latents."""
TO_THE_END = 10_000


@dataclass(frozen=True)
class LoraNode:
    """A LoRA by its name in the workflow, and its strength on what it is applied to; `node` is the id of its loader."""

    name: str
    strength: float
    node: str = field(default="", compare=False)


Loras = tuple[LoraNode, ...]


@dataclass(frozen=True)
class Model:
    """A checkpoint's UNet, by its name in the workflow, and the LoRAs applied to it in order.

    `node` is the id of the loader.
    """

    checkpoint: str
    loras: Loras = ()
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Clip:
    """A checkpoint's text encoders, and the LoRAs applied to these in order; `last_layer` -2 is SDXL's own."""

    checkpoint: str = ""
    loras: Loras = ()
    last_layer: int = -2


@dataclass(frozen=True)
class VaeName:
    """An autoencoder: a checkpoint's, or with `own_file` a separate file that a VAELoader names."""

    name: str
    own_file: bool = False
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Mix:
    """An operation on a prompt's conditioning: zero it, concatenate another one to it, or average both.

    "average" weights the prompt itself by `strength`, and `other` by the rest.
    """

    kind: Literal["zero", "concat", "average"]
    other: "Conditioning | None" = None
    strength: float = 1.0


@dataclass(frozen=True)
class ControlHint:
    """A ControlNet, by its name in the workflow, and its picture, as one node applies it to a conditioning.

    `start` and `end` are shares of the training timesteps. With `both_sides` it counts for the negative side too, if
    that has no ControlNet.
    """

    net: str
    image: "Image"
    strength: float
    start: float = 0.0
    end: float = 1.0
    both_sides: bool = False
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Conditioning:
    """The inputs of one of ComfyUI's text encode nodes. Sizes are (height, width), or None for the size of the latents.

    `score` is the refiner's aesthetic score, None for the base's encoders; `mixes` are applied in order. `node` is the
    id of the text encode node, and `encoder` its class.
    """

    node: str
    text_g: str
    text_l: str
    clip: Clip = Clip()
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    score: float | None = None
    mixes: tuple[Mix, ...] = ()
    controls: "tuple[ControlHint, ...]" = ()
    """The ControlNets that were applied to it, in order."""
    encoder: str = field(default="CLIPTextEncode", compare=False)
    shown: "Encoded | None" = None
    """The masked picture that an inpainting model receives, with its mask; other models ignore it."""


@dataclass(frozen=True)
class Sampling:
    """One KSampler or KSamplerAdvanced: a part of a schedule of `steps`, from `start` to `end`.

    `denoise` below 1 (KSampler's) takes the last part of a longer schedule. If a side has several conditionings, the
    model's predictions for them are averaged.
    """

    node: str
    model: Model
    positive: tuple[Conditioning, ...]
    negative: tuple[Conditioning, ...]
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

    @property
    def shown(self) -> "Encoded | None":
        """Return the masked picture that an inpainting model receives."""
        return next((each.shown for each in self.positive), None)


@dataclass(frozen=True)
class Empty:
    """Empty latents of a picture size in pixels."""

    width: int
    height: int
    batch: int = 1
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Encoded:
    """Latents that an autoencoder encodes from an image, in tiles if `tiled`.

    With a `mask`, the image is grey where that rounds to 1, and the latents carry it, widened by `grow` pixels.
    """

    image: "Image"
    vae: VaeName
    tiled: bool = False
    node: str = field(default="", compare=False)
    mask: "Mask | None" = None
    grow: int = 0


@dataclass(frozen=True)
class Masked:
    """Latents that carry a mask for the samplers after them."""

    latents: "LatentSource"
    mask: "Mask"
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Repeated:
    """A batch of latents that is repeated as a whole, `amount` times."""

    latents: "LatentSource"
    amount: int
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Resized:
    """Latents resized to (width, height) in pixels, where 0 keeps the aspect ratio, or scaled `by` a factor."""

    latents: "LatentSource"
    method: str
    size: tuple[int, int] | None = None
    by: float = 1.0
    centred: bool = False
    """Whether the centre is cropped to the new aspect ratio first."""
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Sampled:
    """Latents that a sampler makes from other latents."""

    latents: "LatentSource"
    sampling: Sampling


@dataclass(frozen=True)
class Loaded:
    """A picture file, by its name in the workflow."""

    file: str
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Padded:
    """An image on a grey canvas with margins (left, top, right, bottom) in pixels."""

    image: "Image"
    margins: tuple[int, int, int, int]
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Mask:
    """A mask from 0 to 1, 1 where the picture changes, as one node makes it from a `mask`, an `image` or a `file`.

    "loaded" is LoadImage's transparency of a `file`, "channel" a channel of a `file` or an `image`, "solid" the first
    of `values` at (width, height), "inverted", "grown" by `values` (pixels, 1 for tapered corners), "feathered" over
    `values` (left, top, right, bottom), "margins" those of a Padded `image` with a feathering, and "fitted" scaled to
    the `image`, as InpaintModelConditioning does.
    """

    kind: Literal["loaded", "channel", "solid", "inverted", "grown", "feathered", "margins", "fitted"]
    mask: "Mask | None" = None
    image: "Image | None" = None
    file: str = ""
    channel: str = ""
    values: tuple[float, ...] = ()
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Scaled:
    """A resized image, with the fields of `Resized`."""

    image: "Image"
    method: str
    size: tuple[int, int] | None = None
    by: float = 1.0
    centred: bool = False
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Decoded:
    """An image that an autoencoder decodes from latents, in tiles if `tiled`."""

    latents: "LatentSource"
    vae: VaeName
    tiled: bool = False
    node: str = field(default="", compare=False)


LatentSource = Empty | Encoded | Masked | Repeated | Resized | Sampled
Image = Loaded | Padded | Scaled | Decoded


@dataclass(frozen=True)
class Output:
    """An image to write, under a name that starts with `prefix`."""

    image: Image
    prefix: str
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Workflow:
    """The pictures that a workflow draws, in the order of its nodes; `graph` is the API JSON that draws them."""

    outputs: tuple[Output, ...]
    graph: str = field(default="", compare=False)
    copies: Mapping[str, str] = field(default_factory=dict, compare=False)
    """The nodes that show the picture of an output again, with that output's node."""

    @property
    def samplings(self) -> tuple[Sampling, ...]:
        """Return every sampler that the pictures need, each once; a sampler follows the one it continues from."""
        found: dict[str, Sampling] = {}
        for output in self.outputs:
            for each in reversed([*ancestry(output.image)]):
                if isinstance(each, Sampled):
                    found.setdefault(each.sampling.node, each.sampling)
        return tuple(found.values())

    @property
    def loads_image(self) -> bool:
        """Return whether any image is encoded to latents."""
        return any(isinstance(each, Encoded) for output in self.outputs for each in ancestry(output.image))


def ancestry(source: LatentSource | Image) -> "list[LatentSource | Image]":
    """Return `source` and the sources it is made from, back to the first; each has at most one source."""
    found: list[LatentSource | Image] = [source]
    while not isinstance(found[-1], Empty | Loaded):
        last = found[-1]
        found.append(last.image if isinstance(last, Encoded | Padded | Scaled) else last.latents)
    return found


def prompts_of(side: Iterable[Conditioning]) -> Iterator[Conditioning]:
    """Yield the prompts of a side, including those mixed into others."""
    for each in side:
        yield each
        yield from prompts_of(mix.other for mix in each.mixes if mix.other is not None)


def noise_mask(source: LatentSource) -> "Masked | Encoded | None":
    """Return the source of the mask that latents carry: it stays through samplers, scaling and repeating."""
    for each in ancestry(source):
        if isinstance(each, Encoded):
            return each if each.mask is not None else None
        if isinstance(each, Masked):
            return each
    return None


def mask_sources(source: LatentSource | Image) -> Iterator["Mask | Image"]:
    """Yield all masks and images beside the ancestry of `source`: those of its masks, and of inpainting models."""
    for each in ancestry(source):
        if isinstance(each, Masked):
            yield from _mask_tree(each.mask)
        if isinstance(each, Encoded) and each.mask is not None:
            yield from _mask_tree(each.mask)
        if isinstance(each, Sampled) and (shown := each.sampling.shown) is not None:
            yield from ancestry(shown.image)  # type: ignore[misc]
            if shown.mask is not None:
                yield from _mask_tree(shown.mask)


def _mask_tree(mask: "Mask") -> Iterator["Mask | Image"]:
    yield mask
    if mask.image is not None:
        yield from ancestry(mask.image)  # type: ignore[misc]
    if mask.mask is not None:
        yield from _mask_tree(mask.mask)
