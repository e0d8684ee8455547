"""Example inputs for a component, similar to those of a run."""

__all__ = ["example_inputs"]

from collections.abc import Iterator, Mapping

import numpy as np

from sdxl_trt.engines.bundle import OF_LATENTS, Bundle, Component, Manifest, Profile, Stage, TextEncoder
from sdxl_trt.engines.engine import Array, numpy_dtype

_TOKEN_SCALE = 0.02
"""About the spread of the vectors of CLIP's tokens, and of embeddings."""


def example_inputs(bundle: Bundle, name: str, profile: Profile, seed: int = 0) -> dict[str, Array]:
    """Return inputs for component `name` with the shapes that `profile` is tuned for and the graph's dtypes.

    They have the scales of a run: noised latents and normalized embeddings of unit variance, timesteps from the
    component's share of the schedule, picture sizes, prompts with bos and eos tokens.
    """
    component = bundle.manifest.components[name]
    rng = np.random.default_rng(seed)
    stage = _stage_of(bundle.manifest, name)
    shapes = {spec.name: profile.shapes[spec.name][1] for spec in component.inputs}
    values: dict[str, Array] = {key: rng.standard_normal(shape) for key, shape in shapes.items()}
    if component.kind in OF_LATENTS:
        values |= _control_values(component, shapes, rng)
        values["timestep"] = _timesteps(bundle.manifest, stage, shapes["timestep"][0])
        values["time_ids"] = np.tile(_time_ids(stage, shapes["sample"]), (shapes["time_ids"][0], 1))
    elif component.kind == "text_encoder":
        values["input_ids"] = _prompts(bundle.manifest, name, shapes["input_ids"], rng)
        if component.takes_embeddings:
            values["embedding_index"] = _embedding_index(shapes["embedding_index"])
            values["embeddings"] *= _TOKEN_SCALE
    elif component.kind == "vae_decoder":
        tiny = name == stage.vae.tiny
        values["latent_sample"] /= stage.vae.tiny_scaling_factor if tiny else stage.vae.scaling_factor
    else:
        values["sample"] = rng.uniform(-1, 1, shapes["sample"])
    return {spec.name: values[spec.name].astype(numpy_dtype(spec)) for spec in component.inputs}


def _control_values(
    component: Component, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator
) -> dict[str, Array]:
    """Return a ControlNet's picture and scales, and zeros for residuals: a run without another ControlNet has none."""
    values: dict[str, Array] = {spec.name: np.zeros(shapes[spec.name]) for spec in component.inputs if spec.optional}
    if "controlnet_cond" in shapes:
        values |= {"controlnet_cond": rng.uniform(0, 1, shapes["controlnet_cond"]), "scales": np.ones(shapes["scales"])}
    return values


def _stage_of(manifest: Manifest, name: str) -> Stage:
    """Return the stage that uses component `name`; the base if both do."""
    for stage in manifest.stages().values():
        vae = stage.vae
        parts = {stage.unet, stage.shallow, vae.decoder, vae.encoder, vae.decoder_bf16, vae.encoder_bf16, vae.tiny}
        if name in parts | {encoder.component for encoder in stage.text_encoders}:
            return stage
    return manifest.base


def _timesteps(manifest: Manifest, stage: Stage, rows: int) -> Array:
    """Return one timestep per row from the stage's share of the schedule: the refiner's is the last fifth."""
    edm = stage.scheduler.edm
    if edm is not None:
        return 0.25 * np.linspace(np.log(edm.sigma_max), np.log(edm.sigma_min), rows)
    steps = stage.scheduler.num_train_timesteps
    last = 0.2 if stage is manifest.refiner else 1.0
    return np.linspace(0.9 * last * steps, 0.4 * last * steps, rows)


def _time_ids(stage: Stage, sample: tuple[int, ...]) -> list[float]:
    height, width = (side * stage.vae.factor for side in sample[-2:])
    values = {"height": height, "width": width, "score": 6.0}
    return [next((value for part, value in values.items() if part in name), 0.0) for name in stage.time_ids]


def _prompts(manifest: Manifest, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    encoder = next(_encoders(manifest, name))
    tokenizer = manifest.tokenizers[encoder.tokenizer]
    ordinary = max(min(tokenizer.bos_id, tokenizer.eos_id), 1)
    ids = rng.integers(0, ordinary, shape)
    ends = rng.integers(1, shape[1], shape[0])
    for row, end in zip(ids, ends, strict=True):
        row[0], row[end], row[end + 1 :] = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    return ids


def _embedding_index(shape: tuple[int, ...]) -> Array:
    """Return the index of a first prompt without embeddings, and of others that begin with one."""
    index = np.zeros(shape, np.int64)
    index[1:, 1] = 1
    return index


def _encoders(manifest: Manifest, name: str) -> Iterator[TextEncoder]:
    for stage in manifest.stages().values():
        yield from (encoder for encoder in stage.text_encoders if encoder.component == name)
