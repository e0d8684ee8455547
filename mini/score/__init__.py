"""Score pictures of scenes against their captions."""

from sdxl_trt.mini.score.border import border_width
from sdxl_trt.mini.score.score import Score, score_picture

__all__ = ["Score", "border_width", "score_picture"]
