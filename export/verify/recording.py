"""Real inputs for every component: some pictures, drawn component by component and recorded at each one's boundary.

To check a model it makes two pictures of different size. The first is guided (two rows, 77 tokens, whole timesteps),
the second is not (one row, two prompts concatenated to 154 tokens, fractional timesteps). Prompts go through the
pipelines' own tokenizers; latents go through Euler steps from the base to the refiner, then to the VAE decoder, and the
pictures to the VAE encoder. Only these small arrays are kept between components. Random arrays replace the outputs of
components that are not part of the run.
"""

__all__ = ["Call", "RecordedPicture", "Recording", "RecordingSettings", "Run"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from sdxl_trt.engines import Array
from sdxl_trt.export.components import ComponentPlan, StagePlan, time_id_names
from sdxl_trt.export.graph import residual_shapes, vae_factor
from sdxl_trt.export.sources import LoadedTokenizer
from sdxl_trt.export.verify.euler import Euler

Run = Callable[[Mapping[str, Array]], dict[str, Array]]
PROMPTS = (
    "a photograph of a red fox in the snow, golden hour, 85 mm, shallow depth of field",
    "",
    "Ein Fjord im Nebel, oil on canvas; " * 12,
)
TOKEN_SPREAD = np.float32(0.02)
GUIDANCE_SCALE, AESTHETIC_SCORES = 5.0, (6.0, 2.5)
# Fractions of the training timesteps at which the UNets run; as in SDXL, the refiner takes over below a fifth.
BASE_GRID, REFINER_GRID = (0.999, 0.7513, 0.5007, 0.2502), (0.1498, 0.0503)


@dataclass(frozen=True)
class RecordedPicture:
    """A picture to draw: its size in latent pixels (height, width), and the UNets' rows.

    A row is the places of the prompts that are concatenated in it. Two rows, the positive one first, are guided. Sizes
    are rounded up to the UNets' multiple; with `whole`, so are timesteps.
    """

    size: tuple[int, int]
    rows: tuple[tuple[int, ...], ...]
    whole: bool = True


GUIDED, ALONE = ((0,), (1,)), ((0, 2),)


@dataclass(frozen=True)
class RecordingSettings:
    """What to draw, and at which fractions of the training timesteps; with `further`, calls that only checks need."""

    prompts: tuple[str, ...] = PROMPTS
    pictures: tuple[RecordedPicture, ...] = (
        RecordedPicture((16, 16), GUIDED),
        RecordedPicture((24, 16), ALONE, whole=False),
    )
    base_grid: tuple[float, ...] = BASE_GRID
    refiner_grid: tuple[float, ...] = REFINER_GRID
    further: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Call:
    """One call of a component: a title, float32 and int64 inputs, and float32 outputs."""

    title: str
    inputs: dict[str, Array]
    outputs: dict[str, Array]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every input."""
        return {name: tuple(array.shape) for name, array in self.inputs.items()}


@dataclass
class _Tape:
    """Runs a component and records its inputs and outputs."""

    run: Run
    calls: list[Call] = field(default_factory=list)

    def __call__(self, title: str, **inputs: Array) -> dict[str, Array]:
        outputs = self.run(inputs)
        self.calls.append(Call(title, inputs, outputs))
        return outputs


class Recording:
    """The request's state between components, which must be recorded in the order of a run."""

    def __init__(self, stages: Mapping[str, StagePlan], settings: RecordingSettings) -> None:
        self._stages, self._settings, self._seed = stages, settings, settings.seed
        self._embeds: dict[tuple[str, str], dict[str, Array]] = {}
        self._sizes = [tuple(-(-side // self._multiple) * self._multiple for side in picture.size)
                       for picture in settings.pictures]  # fmt: skip
        self._latents = [self._noise(settings.seed + i, *size) for i, size in enumerate(self._sizes)]
        self._pictures: dict[str, list[Array]] = {}

    @cached_property
    def _multiple(self) -> int:
        return max(2 ** int(stage.models["unet"].module.num_upsamplers) for stage in self._stages.values())

    def count(self, name: str, plan: ComponentPlan) -> int:
        """Return how often `calls` will run a UNet or a decoder, without the calls that only checks need."""
        using = [stage for stage, record in self._stages.items() if name in record.roles.values()]
        each = sum(len(self._steps(stage)) for stage in using) if plan.kind == "unet" else 1
        return each * len(self._settings.pictures)

    def calls(self, name: str, plan: ComponentPlan, run: Run) -> list[Call]:
        """Run the component `name` on its part of the request with `run`; return its calls."""
        tape = _Tape(run)
        if plan.kind == "controlnet":
            self._control(tape, plan)
            return tape.calls
        for stage_name, stage in self._stages.items():
            for role in (role for role, component in stage.roles.items() if component == name):
                if plan.kind == "text_encoder":
                    self._encode(tape, stage_name, role)
                elif plan.kind == "unet":
                    self._denoise(tape, stage_name)
                elif not tape.calls and plan.kind == "vae_decoder":
                    self._decode(tape, stage, role)
                elif not tape.calls:
                    self._encode_pictures(tape, stage)
        return tape.calls

    def _noise(self, seed: int, height: int, width: int) -> Array:
        channels = self._stages["base"].models["vae"].config["latent_channels"]
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(1, channels, height, width, generator=generator).numpy()

    def _encode(self, tape: _Tape, stage_name: str, role: str) -> None:
        tokenizer = self._stages[stage_name].tokenizer_of(role)
        ids = np.stack([_ids(tokenizer, prompt) for prompt in self._settings.prompts])
        done = next((call for call in tape.calls if np.array_equal(call.inputs["input_ids"], ids)), None)
        width = self._stages[stage_name].models[role].config["hidden_size"]
        outputs = done.outputs if done else tape(
            f"{len(ids)} prompts of the {stage_name}", input_ids=ids, embedding_index=np.zeros_like(ids),
            embeddings=np.zeros((1, width), np.float32),
        )  # fmt: skip
        states = [value for name, value in outputs.items() if name.startswith("hidden_states.")]
        pooled = outputs.get("text_embeds")
        self._embeds[stage_name, role] = {"hidden": states[-2]} | ({} if pooled is None else {"pooled": pooled})
        if done is None and self._settings.further:
            index, vectors = self._embedding(ids[:1].shape, width)
            tape(f"one prompt of the {stage_name} with an embedding", input_ids=ids[:1], embedding_index=index,
                 embeddings=vectors)  # fmt: skip

    def _embedding(self, shape: tuple[int, ...], width: int) -> tuple[Array, Array]:
        """Return an index with two vectors behind the start of a prompt, and vectors of the spread of tokens'."""
        index = np.zeros(shape, np.int64)
        index[:, 1:3] = (2, 1)
        rng = np.random.default_rng(self._seed)
        return index, TOKEN_SPREAD * rng.standard_normal((2, width), dtype=np.float32)

    def _denoise(self, tape: _Tape, stage_name: str) -> None:
        steps = self._steps(stage_name)
        prediction_type = self._stages[stage_name].pipeline.scheduler.prediction_type
        for i, picture in enumerate(self._settings.pictures):
            euler, conditions = self._euler(whole=picture.whole), self._conditions(stage_name, picture)
            tokens = conditions["encoder_hidden_states"].shape[1]
            rows = len(conditions["time_ids"])
            kind = f"{tokens} tokens" if rows == 1 else "guided"
            x = self._latents[i] if steps.start else euler.start(self._latents[i])
            further = self._masked(self._stages[stage_name], x.shape)
            for step in steps:
                sample = np.concatenate([np.concatenate([euler.scaled(x, step), further], axis=1)] * rows)
                timestep = euler.timesteps[step]
                title = f"{kind}, timestep {timestep:g}"
                times = np.full(rows, timestep, np.float32)
                out = tape(title, sample=sample, timestep=times, **conditions)["out_sample"]
                x = euler.step(x, _guided(out), step, prediction_type)
            self._latents[i] = x

    def _steps(self, stage_name: str) -> range:
        """Return the steps of the grid that a stage runs."""
        cut = len(self._settings.base_grid)
        end = cut + len(self._settings.refiner_grid)
        if "refiner" not in self._stages:
            return range(end)
        return range(cut) if stage_name == "base" else range(cut, end)

    def _masked(self, stage: StagePlan, shape: tuple[int, ...]) -> Array:
        """Return what a UNet receives behind latents of `shape`: nothing, or a mask and a masked picture's latents."""
        config, (count, _, height, width) = stage.models["unet"].config, shape
        channels = config["in_channels"] - stage.models["vae"].config["latent_channels"]
        further = np.random.default_rng(self._seed).standard_normal((count, channels, height, width), dtype=np.float32)
        further[:, :1] = np.arange(width) < width // 2
        return further

    def _control(self, tape: _Tape, plan: ComponentPlan) -> None:
        """Run a ControlNet of the base on noise and random pictures, its residuals scaled differently for each row."""
        rng, scheduler = np.random.default_rng(self._seed), self._stages["base"].pipeline.scheduler
        factor, config = vae_factor(self._stages["base"].models["vae"].config), plan.model.config
        count = len(residual_shapes(config))
        for i, spec in enumerate(self._settings.pictures):
            conditions = self._conditions("base", spec)
            rows, size = len(conditions["time_ids"]), self._sizes[i]
            picture = rng.uniform(0, 1, (rows, config["conditioning_channels"], *(factor * side for side in size)))
            timestep = self._settings.base_grid[i] * scheduler.num_train_timesteps
            tape(
                f"{'alone' if rows == 1 else 'guided'}, timestep {timestep:g}",
                sample=np.concatenate([self._noise(self._seed + i, *size)] * rows),
                timestep=np.full(rows, timestep, np.float32),
                controlnet_cond=picture.astype(np.float32),
                scales=rng.uniform(0.1, 1, (rows, count)).astype(np.float32),
                **conditions,
            )

    def _euler(self, *, whole: bool) -> Euler:
        """Return the grid of base and refiner, which is on the base's schedule."""
        scheduler = self._stages["base"].pipeline.scheduler
        times = np.array(self._settings.base_grid + self._settings.refiner_grid) * scheduler.num_train_timesteps
        return Euler(scheduler, list(np.floor(times) if whole else times))

    def _conditions(self, stage_name: str, picture: RecordedPicture) -> dict[str, Array]:
        """Return a UNet's constant inputs for the rows of a picture."""
        stage = self._stages[stage_name]
        roles: list[str] = [role for role in ("text_encoder", "text_encoder_2") if role in stage.roles]
        embeds = [self._embeds.get((stage_name, role)) or self._drawn(stage, role) for role in roles]
        hidden = np.concatenate([each["hidden"] for each in embeds], axis=-1)
        pooled = embeds[roles.index(stage.pooled_role)]["pooled"]
        kept = np.ones((len(picture.rows), 1), np.float32)
        kept[1:] = 0.0 if stage.pipeline.force_zeros_for_empty_prompt else 1.0
        return {
            "encoder_hidden_states": kept[..., None] * np.stack([np.concatenate(hidden[[*row]])
                                                                 for row in picture.rows]),
            "text_embeds": kept * np.stack([pooled[row[0]] for row in picture.rows]),
            "time_ids": _time_ids(stage)[: len(picture.rows)],
        }  # fmt: skip

    def _drawn(self, stage: StagePlan, role: str) -> dict[str, Array]:
        """Return random embeds with unit variance, as a final normalization leaves them."""
        config, rng = stage.models[role].config, np.random.default_rng(self._seed)
        shapes: dict[str, tuple[int, ...]] = {
            "hidden": (len(self._settings.prompts), stage.tokenizer_of(role).max_length, config["hidden_size"]),
            "pooled": (len(self._settings.prompts), config["projection_dim"]),
        }
        return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}

    def _decode(self, tape: _Tape, stage: StagePlan, role: str) -> None:
        config = stage.models[role if role in stage.models else "vae"].config
        pictures = []
        for latents in self._latents:
            clean = _unscaled(latents, config)
            # The second row is the mirror image.
            mirrored = [np.concatenate([clean, clean[..., ::-1]])] if self._settings.further else []
            for value in (clean, *mirrored):
                picture = tape(f"{_size(latents)} latents, {len(value)} rows", latent_sample=value)["sample"]
                pictures.append(np.clip(picture, -1, 1))
        self._pictures[stage.roles[role]] = pictures

    def _encode_pictures(self, tape: _Tape, stage: StagePlan) -> None:
        for picture in self._pictures.get(stage.roles["vae_decoder"]) or self._random_pictures(stage):
            tape(f"{_size(picture)} pixels, {len(picture)} rows", sample=picture)

    def _random_pictures(self, stage: StagePlan) -> list[Array]:
        config, rng = stage.models["vae"].config, np.random.default_rng(self._seed)
        sides = [tuple(side * vae_factor(config) for side in size) for size in self._sizes]
        rows = [(rows, config["in_channels"], *size) for rows, size in enumerate(sides, start=1)]
        return [rng.uniform(-1, 1, shape).astype(np.float32) for shape in rows]


def _ids(tokenizer: LoadedTokenizer, prompt: str) -> Array:
    from tokenizers import Tokenizer  # noqa: PLC0415 - a compiled library

    room = tokenizer.max_length - 2
    body = Tokenizer.from_str(tokenizer.json.decode()).encode(prompt, add_special_tokens=False).ids[:room]
    framed = [tokenizer.bos_id, *body, tokenizer.eos_id]
    return np.array(framed + [tokenizer.pad_id] * (room - len(body)), dtype=np.int64)


def _time_ids(stage: StagePlan) -> Array:
    """Return time ids (2, 5 or 6) for an uncropped picture of the model's training size; positive, then negative."""
    unet, names = stage.models["unet"].config, time_id_names(stage.pipeline)
    side = unet["sample_size"] if isinstance(unet["sample_size"], int) else 128
    pixels = float(side * vae_factor(stage.models["vae"].config))
    rows = [
        [score if name == "aesthetic_score" else 0.0 if name.startswith("crop") else pixels for name in names]
        for score in AESTHETIC_SCORES
    ]
    return np.array(rows, dtype=np.float32)


def _guided(out: Array) -> Array:
    return out if len(out) == 1 else out[1:] + np.float32(GUIDANCE_SCALE) * (out[:1] - out[1:])


def _unscaled(latents: Array, config: Mapping[str, Any]) -> Array:
    """Return the latents at the autoencoder's own scale, the decoder's input."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    spread = np.float32(config["scaling_factor"])
    if mean is None or std is None:
        return latents / spread
    columns = [np.array(value, np.float32).reshape(1, -1, 1, 1) for value in (std, mean)]
    return latents * columns[0] / spread + columns[1]


def _size(array: Array) -> str:
    return "x".join(str(side) for side in array.shape[-2:])
