"""What happens when two features are used together: the result equals a named reference, or the pair is refused.

A new feature is a line of FEATURES and a row of _ROWS. tests/references/test_pairs.py draws or refuses every pair. The
row of shared calls decides which requests share calls of a UNet: `runtime.pipeline.share_key` reads it.
"""

__all__ = ["FEATURES", "PAIRS", "SHARED", "Outcome", "Sharing"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Sharing = Literal["by row", "equal", "alone"]
"""How requests with a feature share calls of a UNet: each in its own rows, only with the same value of it, or not."""
SHARED = "shared call"

FEATURES: Mapping[str, str] = {
    SHARED: "several requests take their steps in common calls of a UNet: `Shared`",
    "fused LoRA": "a LoRA in the bundle's weights: export-engines --lora",
    "LoRA": "a LoRA of a request: --lora, a tag in a prompt",
    "mask": "a part of a picture changes: --image and --mask",
    "nine channels": "the base is an inpainting model, which receives the mask",
    "ControlNet": "the base follows a picture: --control",
    "embedding": "a prompt names a textual inversion: --embedding-dir",
    "tile": "pictures are encoded and decoded in tiles: --tile",
    "tiny decoder": "the bundle's tiny decoder makes the pictures: --vae tiny",
    "refine": "the refiner alone changes a picture: --refine",
    "sweep": "a sheet of variants: --sweep",
    "batch": "several pictures in one run: -n",
    "workflow": "a ComfyUI graph states the request: --workflow",
    "8 bits": "the bundle's UNets are int8 or fp8: export-engines --int8, --fp8",
    "step cache": "the outermost level of a UNet takes some steps without the rest of it: --cache",
}
"""Every feature, and what it is."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What two features do together: one of both texts is given.

    `equal_to` names what the result is equal to. `refused` is a part of the error's message, which says what to do.
    `sharing` is stated with shared calls alone.
    """

    equal_to: str = ""
    refused: str = ""
    sharing: Sharing | None = None

    def __post_init__(self) -> None:
        if bool(self.equal_to) == bool(self.refused):
            raise ValueError("an outcome is either equal to something or refused")


_AS_LORA = Outcome(equal_to="the LoRA given with the request")
_AS_FUSED = Outcome(equal_to="a bundle with the LoRA fused")
_AS_WORDS = Outcome(equal_to="the words whose vectors the embedding holds")
_AS_WHOLE = Outcome(equal_to="the run without tiles, before decoding")
_AS_FULL = Outcome(equal_to="the run with the full decoder, before decoding")
_AS_CELLS = Outcome(equal_to="each cell alone")
_AS_SINGLE = Outcome(equal_to="each picture alone")
_AS_FLOATS = Outcome(equal_to="the run in floats, but for the rounding to 8 bits")
_AS_COMFYUI = Outcome(equal_to="the request with --compat comfyui")
_AS_GRAPH = Outcome(equal_to="the request whose picture carries the graph")
_AS_EXTRAPOLATED = Outcome(equal_to="diffusers' pipeline, the deep features of its UNet extrapolated in some steps")
_ALONE = "each request alone"
_BY_ROW = Outcome(equal_to=_ALONE + ": each has rows of its own", sharing="by row")
_EQUAL = Outcome(equal_to=_ALONE + ": those share calls that have the same", sharing="equal")
_BY_ITSELF = Outcome(equal_to=_ALONE + ": it shares no call", sharing="alone")
_ROWS: Mapping[str, Mapping[str, Outcome]] = {
    SHARED: {
        "fused LoRA": _BY_ROW,
        "LoRA": _EQUAL,
        "mask": _BY_ROW,
        "nine channels": _BY_ROW,
        "ControlNet": _BY_ITSELF,
        "embedding": _BY_ROW,
        "tile": _BY_ROW,
        "tiny decoder": _BY_ROW,
        "refine": _EQUAL,
        "sweep": _BY_ROW,
        "batch": _BY_ROW,
        "workflow": _BY_ROW,
        "8 bits": _BY_ROW,
        "step cache": _BY_ITSELF,
    },
    "fused LoRA": {
        "LoRA": Outcome(equal_to="both LoRAs given with the request"),
        "mask": _AS_LORA,
        "nine channels": _AS_LORA,
        "ControlNet": _AS_LORA,
        "embedding": _AS_LORA,
        "tile": _AS_WHOLE,
        "tiny decoder": _AS_FULL,
        "refine": Outcome(equal_to="the refiner of a bundle without the LoRA"),
        "sweep": _AS_CELLS,
        "batch": _AS_SINGLE,
        "workflow": _AS_GRAPH,
        "8 bits": Outcome(equal_to="the run in floats with the LoRA fused, but for the rounding to 8 bits"),
        "step cache": _AS_LORA,
    },
    "LoRA": {
        "mask": _AS_FUSED,
        "nine channels": _AS_FUSED,
        "ControlNet": _AS_FUSED,
        "embedding": _AS_FUSED,
        "tile": _AS_WHOLE,
        "tiny decoder": _AS_FULL,
        "refine": Outcome(equal_to="the run without the LoRA, with a warning"),
        "sweep": _AS_CELLS,
        "batch": _AS_SINGLE,
        "workflow": _AS_GRAPH,
        "8 bits": Outcome(refused="LoRAs cannot change 8-bit weights on ONNX Runtime"),
        "step cache": _AS_FUSED,
    },
    "mask": {
        "nine channels": Outcome(equal_to="diffusers' StableDiffusionXLInpaintPipeline"),
        "ControlNet": Outcome(equal_to="diffusers' StableDiffusionXLControlNetInpaintPipeline"),
        "embedding": _AS_WORDS,
        "tile": _AS_WHOLE,
        "tiny decoder": _AS_FULL,
        "refine": Outcome(equal_to="diffusers' StableDiffusionXLInpaintPipeline of the refiner"),
        "sweep": _AS_CELLS,
        "batch": _AS_SINGLE,
        "workflow": _AS_GRAPH,
        "8 bits": _AS_FLOATS,
        "step cache": _AS_EXTRAPOLATED,
    },
    "nine channels": {
        "ControlNet": Outcome(refused="a ControlNet takes a base of 4 channels, and this one is an inpainting model"),
        "embedding": _AS_WORDS,
        "tile": _AS_WHOLE,
        "tiny decoder": _AS_FULL,
        "refine": Outcome(equal_to="the refiner of a bundle with four channels"),
        "sweep": _AS_CELLS,
        "batch": _AS_SINGLE,
        "workflow": _AS_COMFYUI,
        "8 bits": _AS_FLOATS,
        "step cache": _AS_EXTRAPOLATED,
    },
    "ControlNet": {
        "embedding": _AS_WORDS,
        "tile": _AS_WHOLE,
        "tiny decoder": _AS_FULL,
        "refine": Outcome(refused="a ControlNet belongs to the base, and the refiner alone runs"),
        "sweep": _AS_CELLS,
        "batch": _AS_SINGLE,
        "workflow": _AS_GRAPH,
        "8 bits": Outcome(refused="the ranges are measured without a ControlNet; export with --fp16"),
        "step cache": _AS_EXTRAPOLATED,
    },
    "embedding": {
        "tile": _AS_WHOLE,
        "tiny decoder": _AS_FULL,
        "refine": _AS_WORDS,
        "sweep": _AS_CELLS,
        "batch": _AS_SINGLE,
        "workflow": _AS_GRAPH,
        "8 bits": _AS_WORDS,
        "step cache": _AS_WORDS,
    },
    "tile": {
        "tiny decoder": Outcome(equal_to="the run with the full decoder and without tiles, before decoding"),
        "refine": _AS_WHOLE,
        "sweep": _AS_CELLS,
        "batch": _AS_SINGLE,
        "workflow": _AS_WHOLE,
        "8 bits": _AS_WHOLE,
        "step cache": _AS_WHOLE,
    },
    "tiny decoder": {
        "refine": _AS_FULL,
        "sweep": _AS_CELLS,
        "batch": _AS_SINGLE,
        "workflow": _AS_GRAPH,
        "8 bits": _AS_FULL,
        "step cache": _AS_FULL,
    },
    "refine": {
        "sweep": _AS_CELLS,
        "batch": _AS_SINGLE,
        "workflow": _AS_GRAPH,
        "8 bits": _AS_FLOATS,
        "step cache": _AS_EXTRAPOLATED,
    },
    "sweep": {
        "batch": Outcome(refused="--sweep makes one picture a cell"),
        "workflow": _AS_CELLS,
        "8 bits": _AS_CELLS,
        "step cache": _AS_CELLS,
    },
    "batch": {
        "workflow": _AS_GRAPH,
        "8 bits": _AS_SINGLE,
        "step cache": _AS_SINGLE,
    },
    "workflow": {
        "8 bits": _AS_GRAPH,
        "step cache": _AS_COMFYUI,
    },
    "8 bits": {
        "step cache": _AS_FLOATS,
    },
}
PAIRS: Mapping[tuple[str, str], Outcome] = {
    (first, second): outcome for first, row in _ROWS.items() for second, outcome in row.items()
}
"""Every two features, in the order of FEATURES, and what they do together."""
