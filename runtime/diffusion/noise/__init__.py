"""Noise with the values of torch and torchsde, drawn without torch."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.runtime.diffusion.noise.sources import BatchNoise, NoiseSource, PictureNoise
else:
    __getattr__ = lazy_names(__name__, {
        "sources": ("BatchNoise", "NoiseSource", "PictureNoise"),
    })

__all__ = ["BatchNoise", "NoiseSource", "PictureNoise"]
