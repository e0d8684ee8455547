"""Score pictures of scenes against their captions."""

from sdxl_trt.mini.score.score import Score, score_picture

__all__ = ["Score", "score_picture"]
