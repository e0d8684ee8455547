"""Micro-conditions against diffusers' own, and the order of a phase's rows."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.bundle.manifest import Scheduler, Stage, TensorSpec, Vae
from sdxl_trt.engines.errors import CorruptError
from sdxl_trt.runtime.diffusion.conditioning import MicroConditions, make_conditions
from sdxl_trt.runtime.text.encoder import PromptEmbeds

BASE = ("original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width")
REFINER = ("original_height", "original_width", "crop_top", "crop_left", "aesthetic_score")
MICRO = MicroConditions((768, 1024), (3, 5), (512, 640), 6.0, 2.5)
sides = st.integers(0, 16384)
pairs_of_sides = st.tuples(sides, sides)


def _diffusers(micro: MicroConditions, *, aesthetics: bool) -> list[list[float]]:
    """Return diffusers' time ids of the positive and the negative rows."""
    import torch
    from diffusers import StableDiffusionXLImg2ImgPipeline

    ids = 5 if aesthetics else 6
    pipeline = SimpleNamespace(
        config=SimpleNamespace(requires_aesthetics_score=aesthetics),
        unet=SimpleNamespace(
            config=SimpleNamespace(addition_time_embed_dim=256),
            add_embedding=SimpleNamespace(linear_1=SimpleNamespace(in_features=256 * ids + 1280)),
        ),
    )
    made = StableDiffusionXLImg2ImgPipeline._get_add_time_ids(
        pipeline, micro.original_size, micro.crop, micro.target_size, micro.aesthetic_score,
        micro.negative_aesthetic_score, micro.original_size, micro.crop, micro.target_size, torch.float32, 1280,
    )  # fmt: skip
    return [value[0].tolist() for value in made]


@settings(deadline=None)
@given(original=pairs_of_sides, crop=pairs_of_sides, target=pairs_of_sides, score=st.floats(0, 10, width=32))
def test_time_ids_are_diffusers(
    original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int], score: float
) -> None:
    micro = MicroConditions(original, crop, target, score, 2.5)
    for layout, aesthetics in ((BASE, False), (REFINER, True)):
        ours = [micro.time_ids(layout, negative=negative).tolist() for negative in (False, True)]
        assert ours == _diffusers(micro, aesthetics=aesthetics)


def test_the_order_is_that_of_the_layout_with_height_before_width() -> None:
    assert MICRO.time_ids(BASE).tolist() == [768, 1024, 3, 5, 512, 640]
    assert MICRO.time_ids(REFINER).tolist() == [768, 1024, 3, 5, 6]
    assert MICRO.time_ids(REFINER, negative=True).tolist() == [768, 1024, 3, 5, 2.5]
    assert MICRO.time_ids(("crop_left", "original_width")).tolist() == [5, 1024]
    assert MICRO.time_ids(BASE).dtype == np.float32


def test_an_unknown_time_id_is_named() -> None:
    with pytest.raises(CorruptError, match="'sharpness' in the manifest is unknown"):
        MICRO.time_ids((*BASE, "sharpness"))


@pytest.fixture
def stage() -> Stage:
    vae = Vae(decoder="v", encoder=None, scaling_factor=1.0, latent_channels=4, factor=8)
    return Stage(
        unet="u", text_encoders=(), vae=vae, scheduler=Scheduler(), time_ids=REFINER, sample_size=16, size_multiple=8,
        force_zeros_for_empty_prompt=True,
    )  # fmt: skip


def _engine(hidden: str) -> SimpleNamespace:
    """Return an engine's input dtypes for make_conditions: `hidden` for hidden states, else float32."""

    def spec(name: str) -> TensorSpec:
        return TensorSpec(name=name, dtype=hidden if name == "encoder_hidden_states" else "float32", shape=())

    return SimpleNamespace(component=SimpleNamespace(input=spec))


def _embeds(value: float) -> PromptEmbeds:
    return PromptEmbeds(np.full((77, 8), value, np.float32), np.full(6, -value, np.float32))


@pytest.mark.parametrize("pictures", [1, 3])
def test_rows_are_positives_then_negatives(stage: Stage, pictures: int) -> None:
    made = make_conditions(_engine("float32"), stage, _embeds(1), _embeds(2), MICRO, 5.0, pictures)
    assert made.guided
    assert made.inputs["encoder_hidden_states"].shape == (2 * pictures, 77, 8)
    assert made.inputs["encoder_hidden_states"][:, 0, 0].tolist() == [1] * pictures + [2] * pictures
    assert made.inputs["text_embeds"][:, 0].tolist() == [-1] * pictures + [-2] * pictures
    assert made.inputs["time_ids"][:, -1].tolist() == [6] * pictures + [2.5] * pictures


@pytest.mark.parametrize("guidance", [1.0, 0.0])
def test_without_guidance_there_are_no_negative_rows(stage: Stage, guidance: float) -> None:
    made = make_conditions(_engine("float32"), stage, _embeds(1), _embeds(2), MICRO, guidance, 2)
    assert not made.guided
    assert {name: len(array) for name, array in made.inputs.items()} == dict.fromkeys(made.inputs, 2)
    assert made.inputs["time_ids"][:, -1].tolist() == [6, 6]


def test_each_input_has_the_engines_dtype(stage: Stage) -> None:
    made = make_conditions(_engine("float16"), stage, _embeds(1), _embeds(2), MICRO, 5.0, 1)
    dtypes = {name: str(array.dtype) for name, array in made.inputs.items()}
    assert dtypes == {"encoder_hidden_states": "float16", "text_embeds": "float32", "time_ids": "float32"}


def test_prompts_of_different_lengths_are_repeated_to_the_least_common_multiple(stage: Stage) -> None:
    long = PromptEmbeds(np.repeat(np.arange(3, dtype=np.float32), 77)[:, None], np.zeros(6, np.float32))
    short = PromptEmbeds(np.repeat(np.arange(2, dtype=np.float32), 77)[:, None], np.zeros(6, np.float32))
    hidden = make_conditions(_engine("float32"), stage, long, short, MICRO, 5.0, 1).inputs["encoder_hidden_states"]
    assert hidden.shape == (2, 6 * 77, 1)
    assert hidden[:, ::77, 0].tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 0, 1]]
    alone = make_conditions(_engine("float32"), stage, long, short, MICRO, 1.0, 1).inputs["encoder_hidden_states"]
    assert alone.shape == (1, 3 * 77, 1)


def test_each_side_may_have_its_own_sizes_and_any_scale_may_guide(stage: Stage) -> None:
    other = MicroConditions((1, 2), (3, 4), (5, 6), 7.0, 8.0)
    made = make_conditions(_engine("float32"), stage, _embeds(1), _embeds(2), (MICRO, other), 0.5, 1, comfyui_rule=True)
    assert made.guided
    assert made.inputs["time_ids"].tolist() == [[768, 1024, 3, 5, 6], [1, 2, 3, 4, 8]]
