"""Estimates of activations, compared with the real builder's figures for plans of these graphs."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.bundle.manifest import Component
from sdxl_trt.engines.bundle.profile import Profile, Range, fixed
from sdxl_trt.engines.plans.sizes import component_profiles
from sdxl_trt.engines.residency.activations import estimate_activations, estimate_error, largest_axes, score_bytes
from sdxl_trt.mini.embedded import bundle_path

Axis = int | tuple[int, int, int]
MINI = read_bundle(bundle_path()).manifest.components
WIDE, WIDER, TILE = (64, 128, 128), (64, 128, 160), (32, 64, 64)
BASE, REFINER = (320, 640, 1280), (384, 768)


def component(name: str, widths: tuple[int, ...] = (), precision: str = "fp16", layers: int = 2) -> Component:
    """Return a component of the embedded pair with another model's widths."""
    changed: dict[str, Any] = {"block_out_channels": list(widths), "layers_per_block": layers} if widths else {}
    return replace(MINI[name], config=MINI[name].config | changed, precision=precision)


def profile(of: Component, **axes: Axis) -> tuple[Profile, ...]:
    ranges = {
        axis: fixed(size) if isinstance(size, int) else Range(min=size[0], opt=size[1], max=size[2])
        for axis, size in axes.items()
    }
    return component_profiles({spec.name: spec.shape for spec in of.inputs}, [ranges])


def unet_profile(
    of: Component, sides: int | tuple[int, int, int], rows: int | tuple[int, int, int]
) -> tuple[Profile, ...]:
    return profile(of, height=sides, width=sides, rows=rows, tokens=77 if isinstance(sides, int) else (77, 77, 231))


@pytest.mark.parametrize(
    ("widths", "sides", "rows", "built"),
    [
        (BASE, 128, 2, 258_695_168),
        (BASE, 128, 1, 134_188_544),
        (BASE, 96, 2, 150_773_760),
        (BASE, WIDER, (1, 2, 2), 728_769_536),
        (BASE[:2], 128, 2, 262_448_128),
        (BASE[:2], 128, 8, 1_049_791_488),
        (BASE[:2], WIDER, (1, 2, 2), 703_440_896),
        (REFINER, 128, 2, 314_884_608),
        (REFINER, WIDE, (1, 2, 2), 537_641_984),
        (REFINER, WIDER, (1, 2, 2), 844_129_280),
        # SDXL at its full depth: benchmarks/results/build.json.
        (BASE, 128, 2, 303_243_264),
        (BASE, WIDER, (1, 2, 2), 757_815_296),
        (BASE, WIDER, (1, 2, 8), 3_031_261_184),
        (REFINER, 128, 2, 334_538_752),
        (REFINER, WIDER, (1, 2, 2), 909_408_768),
        (REFINER, WIDER, (1, 2, 8), 3_637_635_072),
        ((128, 256), 128, 2, 113_328_128),
        ((128, 256), WIDER, (1, 2, 2), 274_823_168),
        ((64, 128, 256), 128, 2, 86_259_712),
        ((64, 128, 256), WIDE, (1, 2, 2), 99_480_576),
        ((64, 128, 256), (64, 128, 192), (1, 2, 8), 871_238_656),
        ((64, 128, 256, 256), 128, 8, 345_059_328),
    ],
)
def test_estimates_of_unets_match_the_builder(widths: tuple[int, ...], sides: Axis, rows: Axis, built: int) -> None:
    unet = component("unet", widths)
    estimated = estimate_activations(unet, unet_profile(unet, sides, rows))
    assert estimated == pytest.approx(built, rel=estimate_error(unet))


@pytest.mark.parametrize(
    ("precision", "sides", "built"),
    [
        ("fp16", 128, 1_350_468_096),
        ("bf16", 128, 1_350_468_096),
        ("fp16", 64, 343_835_136),
        ("fp32", 64, 679_379_456),
        ("mixed", 64, 679_379_456),
        ("fp16", WIDE, 3_095_200_256),
        ("bf16", WIDER, 4_831_642_112),
        ("bf16", TILE, 775_946_752),
        ("fp32", TILE, 956_105_216),
    ],
)
def test_estimates_of_decoders_match_the_builder(precision: str, sides: Axis, built: int) -> None:
    decoder = component("vae_decoder", (128, 256, 512, 512), precision)
    estimated = estimate_activations(decoder, profile(decoder, pictures=1, height=sides, width=sides))
    assert estimated == pytest.approx(built, rel=0.03)


def test_a_narrow_decoder_needs_as_much_as_a_dynamic_one() -> None:
    decoder = MINI["vae_decoder"]
    estimated = estimate_activations(decoder, profile(decoder, pictures=1, height=128, width=128))
    assert estimated == pytest.approx(377_487_872, rel=0.06)


@pytest.mark.parametrize(
    ("name", "hidden", "built"),
    [("text_encoder", 48, 8_879_104), ("text_encoder_2", 64, 8_842_240), ("text_encoder_2", 128, 9_394_176)],
)
def test_estimates_of_text_encoders_match_the_builder(name: str, hidden: int, built: int) -> None:
    encoder = replace(MINI[name], config=MINI[name].config | {"hidden_size": hidden})
    assert estimate_activations(encoder, profile(encoder, prompts=(1, 2, 8), vectors=(1, 1, 248))) == pytest.approx(
        built, rel=0.05
    )


sizes = st.integers(1, 20).map(lambda n: 8 * n)


@given(rows=st.integers(1, 8), side=sizes, more=sizes, widths=st.sampled_from([BASE, REFINER, (64,)]))
def test_larger_shapes_need_more(rows: int, side: int, more: int, widths: tuple[int, ...]) -> None:
    unet = component("unet", widths)

    def estimate(rows: int, side: int) -> int:
        return estimate_activations(unet, unet_profile(unet, (8, 8, side), (1, 1, rows)))

    assert estimate(rows, side) < estimate(rows + 1, side)
    assert estimate(rows, side) < estimate(rows, side + more)


def test_the_largest_profile_decides() -> None:
    unet = component("unet", BASE)
    one, two = (unet_profile(unet, 128, rows) for rows in (1, 2))
    assert estimate_activations(unet, one + two) == estimate_activations(unet, two)
    assert largest_axes(unet, two[0]) == {"rows": 2, "height": 128, "width": 128, "tokens": 77}


def test_depth_adds_skip_connections() -> None:
    shallow, deep = (component("unet", BASE, layers=layers) for layers in (1, 3))
    at = unet_profile(shallow, 128, 2)
    assert estimate_activations(shallow, at) < estimate_activations(deep, at)


def test_a_given_precision_overrides_the_component_s() -> None:
    decoder = component("vae_decoder", (128, 256, 512, 512), "fp16")
    at = profile(decoder, pictures=1, height=64, width=64)
    assert estimate_activations(decoder, at, "fp32") == pytest.approx(2 * estimate_activations(decoder, at), rel=0.05)


def test_scores_are_those_of_the_first_level_with_attention() -> None:
    # Level 1 of the embedded base: 6 heads with 8 x 8 positions at 16 x 16 latents, plus half as much for the softmax.
    unet = MINI["unet"]
    assert score_bytes(unet, unet_profile(unet, 16, 2), "fp32") == 1.5 * 2 * 6 * 64**2 * 4
    decoder = MINI["vae_decoder"]
    at = profile(decoder, pictures=1, height=16, width=16)
    assert score_bytes(decoder, at, "fp32") == 1.5 * 256**2 * 4
    tiny = replace(decoder.source, class_name="AutoencoderTiny")
    assert score_bytes(replace(decoder, source=tiny), at, "fp32") == 0, "it has no attention"


def test_a_component_without_config_has_an_estimate(component_of: Callable[..., Component]) -> None:
    for kind in ("unet", "text_encoder", "vae_decoder", "vae_encoder"):
        assert estimate_activations(component_of(kind, 1), profile(component_of(kind, 1))) > 0
