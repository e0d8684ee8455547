"""The contestants' common inputs: drawn once from a seed and written to one file that all of them read."""

__all__ = ["draw_inputs", "unet_rows", "write_inputs"]

from pathlib import Path

import numpy as np
import numpy.typing as npt

from sdxl_trt.engines.bundle import Bundle, Stage
from sdxl_trt.engines.host import atomic_write
from sdxl_trt.runtime.text import PromptTokenizer

TIMESTEPS = {"base": 500.0, "refiner": 100.0}
"""A timestep in the middle of each expert's range."""
Arrays = dict[str, npt.NDArray[np.generic]]


def unet_rows(batch: int, guidance: float) -> int:
    """Return the rows of a UNet call: two per picture with guidance, else one."""
    return batch * (2 if guidance > 1.0 else 1)


def draw_inputs(
    bundle: Bundle, *, width: int, height: int, batch: int, guidance: float, seed: int, prompt: str
) -> Arrays:
    """Return the inputs of all tasks by name: float32, token ids int64.

    `latents` (batch, 4, h/8, w/8) are the pictures' noise. ``base/sample`` etc. and ``refiner/sample`` etc. are a
    UNet's inputs at the timestep in TIMESTEPS, ``ids/0`` and ``ids/1`` (2, 77) the prompt and an empty one for each
    encoder of the base, ``decode/latent_sample`` one picture's latents.
    """
    random = np.random.default_rng(seed)
    vae = bundle.manifest.base.vae
    shape = (vae.latent_channels, height // vae.factor, width // vae.factor)

    def normal(*sizes: int) -> npt.NDArray[np.float32]:
        return random.standard_normal(sizes, dtype=np.float32)

    rows = unet_rows(batch, guidance)
    found: Arrays = {"latents": normal(batch, *shape), "decode/latent_sample": normal(1, *shape)}
    for name, stage in bundle.manifest.stages().items():
        widths = _widths(bundle, stage)
        found[f"{name}/sample"] = normal(rows, *shape)
        found[f"{name}/timestep"] = np.full((rows,), TIMESTEPS[name], np.float32)
        found[f"{name}/encoder_hidden_states"] = normal(rows, 77, widths["encoder_hidden_states"])
        found[f"{name}/text_embeds"] = normal(rows, widths["text_embeds"])
        found[f"{name}/time_ids"] = np.tile(_time_ids(stage, width, height), (rows, 1))
    for number, encoder in enumerate(bundle.manifest.base.text_encoders):
        tokenizer = PromptTokenizer(bundle, encoder.tokenizer)
        found[f"ids/{number}"] = np.stack([tokenizer.ids(prompt), tokenizer.ids("")])
    return found


def write_inputs(path: Path, arrays: Arrays) -> None:
    """Write `arrays` as an .npz file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        np.savez(file, allow_pickle=False, **dict(arrays))


def _widths(bundle: Bundle, stage: Stage) -> dict[str, int]:
    """Return the size of the last axis of every input of a stage's UNet, if it is fixed."""
    inputs = bundle.manifest.components[stage.unet].inputs
    return {spec.name: spec.shape[-1] for spec in inputs if spec.shape and isinstance(spec.shape[-1], int)}


def _time_ids(stage: Stage, width: int, height: int) -> npt.NDArray[np.float32]:
    """Return the default time ids of a stage: the picture's size, no crop, and aesthetic score 6."""
    values = {"original_height": height, "original_width": width, "crop_top": 0, "crop_left": 0,
              "target_height": height, "target_width": width, "aesthetic_score": 6.0}  # fmt: skip
    return np.array([values[name] for name in stage.time_ids], np.float32)
