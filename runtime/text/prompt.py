"""A prompt as it is given to the text encoders of a stage."""

__all__ = ["Prompt"]

from dataclasses import dataclass

from sdxl_trt.engines.adapters import ScaledLora
from sdxl_trt.runtime.adapters import NO_EMBEDDINGS, Embeddings


@dataclass(frozen=True)
class Prompt:
    """A prompt, the second encoder's prompt, and how many final layers are skipped in addition to SDXL's one.

    `loras` are those of the encoders that read it; None means those of its stage, which the pipeline fills in.
    `embeddings` are those that the texts may name.
    """

    text: str
    text_2: str
    clip_skip: int = 0
    loras: tuple[ScaledLora, ...] | None = None
    embeddings: Embeddings = NO_EMBEDDINGS
