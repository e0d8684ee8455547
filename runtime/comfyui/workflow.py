"""What a ComfyUI workflow asks for: which pictures it draws, and of what: samplers, prompts, models, latents, images.

Every link from a picture back to the checkpoints is followed. What cannot be run is named, node by node, in one error;
where some pictures can be drawn and others not, those are drawn and the others named in warnings, as ComfyUI does.
"""

__all__ = [
    "TO_THE_END",
    "Clip",
    "Conditioning",
    "Decoded",
    "Empty",
    "Encoded",
    "Image",
    "LatentSource",
    "Loaded",
    "Mix",
    "Model",
    "Output",
    "Repeated",
    "Resized",
    "Sampled",
    "Sampling",
    "Scaled",
    "VaeName",
    "Workflow",
]

from dataclasses import dataclass, field
from typing import Literal

# KSamplerAdvanced's own default for "to the end".
TO_THE_END = 10_000
Loras = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Model:
    """A checkpoint's UNet, by the name that the workflow gives it, and the LoRAs (name, strength) put on it in order.

    `node` is the loader's.
    """

    checkpoint: str
    loras: Loras = ()
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Clip:
    """A checkpoint's text encoders, with LoRAs at their strengths here; `last_layer` -2 is SDXL's own."""

    checkpoint: str = ""
    loras: Loras = ()
    last_layer: int = -2


@dataclass(frozen=True)
class VaeName:
    """An autoencoder: a checkpoint's, or with `own_file` one that a VAELoader names."""

    name: str
    own_file: bool = False
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Mix:
    """What is made of a prompt's conditioning: zeros, or another one beside it or averaged with it.

    "average" counts the prompt itself with `strength`, and `other` with the rest.
    """

    kind: Literal["zero", "concat", "average"]
    other: "Conditioning | None" = None
    strength: float = 1.0


@dataclass(frozen=True)
class Conditioning:
    """A prompt as one of ComfyUI's encoders takes it. Sizes are (height, width), None where the latents give them.

    `score` is the refiner's aesthetic score, None for the base's encoders; `mixes` are done in their order. `node` is
    the encoder's, and `encoder` its class.
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
    encoder: str = field(default="CLIPTextEncode", compare=False)


@dataclass(frozen=True)
class Sampling:
    """One KSampler or KSamplerAdvanced: a part of a schedule of `steps`, from `start` to `end`.

    `denoise` below 1 (KSampler's) takes the last part of a longer schedule. Of several conditionings of a side the
    model's answers are averaged.
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


@dataclass(frozen=True)
class Empty:
    """Empty latents of a picture size in pixels."""

    width: int
    height: int
    batch: int = 1
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Encoded:
    """What an autoencoder makes of an image; `tiled` in tiles."""

    image: "Image"
    vae: VaeName
    tiled: bool = False
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Repeated:
    """Every one of some latents, several times: the batch as a whole, again and again."""

    latents: "LatentSource"
    amount: int
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Resized:
    """Latents of another size: (width, height) in pixels, 0 for what keeps the shape, or scaled `by` a factor."""

    latents: "LatentSource"
    method: str
    size: tuple[int, int] | None = None
    by: float = 1.0
    centred: bool = False
    """Whether what is too long is cut off on both sides first."""
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Sampled:
    """What a sampler makes of latents."""

    latents: "LatentSource"
    sampling: Sampling


@dataclass(frozen=True)
class Loaded:
    """A picture file by the name that the workflow gives it."""

    file: str
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Scaled:
    """An image of another size, as `Resized`."""

    image: "Image"
    method: str
    size: tuple[int, int] | None = None
    by: float = 1.0
    centred: bool = False
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Decoded:
    """What an autoencoder makes of latents; `tiled` in tiles."""

    latents: "LatentSource"
    vae: VaeName
    tiled: bool = False
    node: str = field(default="", compare=False)


LatentSource = Empty | Encoded | Repeated | Resized | Sampled
Image = Loaded | Scaled | Decoded


@dataclass(frozen=True)
class Output:
    """An image that is written, under a name that starts with `prefix`."""

    image: Image
    prefix: str
    node: str = field(default="", compare=False)


@dataclass(frozen=True)
class Workflow:
    """The pictures that a workflow draws, in the order of its nodes; `graph` draws them, JSON in API form."""

    outputs: tuple[Output, ...]
    graph: str = field(default="", compare=False)

    @property
    def samplings(self) -> tuple[Sampling, ...]:
        """Return every sampler that the pictures need, each once, first those that others go on from."""
        found: dict[str, Sampling] = {}
        for output in self.outputs:
            for each in reversed([*ancestry(output.image)]):
                if isinstance(each, Sampled):
                    found.setdefault(each.sampling.node, each.sampling)
        return tuple(found.values())

    @property
    def loads_image(self) -> bool:
        """Return whether a picture is encoded on the way."""
        return any(isinstance(each, Encoded) for output in self.outputs for each in ancestry(output.image))


def ancestry(source: LatentSource | Image) -> "list[LatentSource | Image]":
    """Return `source` and what it is made of, back to where it starts: each is made of one other at most."""
    found: list[LatentSource | Image] = [source]
    while not isinstance(found[-1], Empty | Loaded):
        last = found[-1]
        found.append(last.image if isinstance(last, Encoded | Scaled) else last.latents)
    return found
