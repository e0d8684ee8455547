"""What is asked for, and what that comes to for one bundle: defaults are resolved once, here."""

__all__ = ["PlainSettings", "Request"]

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.runtime.images import InputPicture
from sdxl_trt.runtime.request.handoff import HandoffSettings
from sdxl_trt.runtime.request.sides import SideSettings


@dataclass(frozen=True, kw_only=True)
class PlainSettings:
    """Settings that need no resolution."""

    compat: Literal["diffusers", "comfyui"] = "diffusers"
    """Whose ways with noise, prompts, timesteps and pixels are followed."""
    steps: int = 30
    guidance: float = 5.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """The part of the steps that is guided, as fractions; the others run the prompt alone, in half the rows."""
    sampler: str = "auto"
    """"auto": what the bundle's scheduler class does; in ComfyUI's way, which knows no such class, euler."""
    prediction_type: str = "auto"
    """What the UNets predict, epsilon, v_prediction or sample; "auto": what the bundle says of each."""
    tile: bool = False
    """Encode and decode in tiles, also where the autoencoder could take the whole picture."""

    @property
    def comfyui(self) -> bool:
        """Return whether ComfyUI is followed."""
        return self.compat == "comfyui"


@dataclass(frozen=True)
class Request(HandoffSettings, SideSettings, PlainSettings):
    """What a user asks for. None takes the default that fits the bundle.

    Picture i has seed `seed` + i; in ComfyUI's way all pictures are a batch of one seed. The refiner's own noise, if
    any, is drawn from `refiner_seed`, None for the base's. `latents` is the initial noise, float32 (count, channels,
    height/8, width/8) of unit variance. `image` is what to start from in the place of noise alone, pixels uint8
    (height, width, 3) or latents float32 as `Run.final` has them, `strength` how much of it is changed.
    """

    prompt: str = ""
    refiner_sampler: str | None = None
    schedule: str = ""
    """``SPACING[+TRANSFORM]``, as diffusers makes it for the sampler's scheduler class; "" is the config's spacing. In
    ComfyUI's way one of its schedules, "" for normal."""
    refiner_guidance: float | None = None
    seed: int | None = None
    refiner_seed: int | None = None
    count: int | None = None
    width: int | None = None
    height: int | None = None
    latents: NDArray[np.float32] | None = None
    image: InputPicture | NDArray[np.uint8] | NDArray[np.float32] | None = None
    checkpoints: tuple[str, ...] = ()
    """What a workflow calls the models, base first; for the record."""
    graph: str = ""
    """The ComfyUI graph that asks for it, as JSON in API form; for the record, where no other says it."""
