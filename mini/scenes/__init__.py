"""The scenes that the embedded pair is trained on, with captions."""

from sdxl_trt.mini.scenes.captions import Asked, draw_caption, read_caption
from sdxl_trt.mini.scenes.drawing import (
    COLOURS, FILL_CONTRAST, SHAPES, SIDE, STICKER_BORDER, TEXTURE_CONTRAST, Picture, Plane, extent, shade, shape_mask,
)
from sdxl_trt.mini.scenes.scenes import (
    EVALUATION_SEEDS, HELD_OUT, TRAINING_SEEDS, VALIDATION_SEEDS, example, render, sample_scene, training_pairs,
)

__all__ = [
    "COLOURS", "EVALUATION_SEEDS", "FILL_CONTRAST", "HELD_OUT", "SHAPES", "SIDE", "STICKER_BORDER", "TEXTURE_CONTRAST",
    "TRAINING_SEEDS", "VALIDATION_SEEDS", "Asked", "Picture", "Plane", "draw_caption", "example", "extent",
    "read_caption", "render", "sample_scene", "shade", "shape_mask", "training_pairs",
]
