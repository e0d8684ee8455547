"""Ranges, sizes and profiles: what is parsed, the profiles of each graph, and what is refused."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_trt.engines.bundle.profile import Profile, Range, fixed
from sdxl_trt.engines.errors import SizeError, UsageError
from sdxl_trt.engines.plans.shapes import choose_profile
from sdxl_trt.engines.plans.sizes import Sizes, axes_of, check_sizes, component_profiles, default_sizes, parse_range

UNET = {
    "sample": ("rows", 4, "height", "width"),
    "timestep": ("rows",),
    "encoder_hidden_states": ("rows", "tokens", 2048),
    "text_embeds": ("rows", 1280),
    "time_ids": ("rows", 6),
}


@given(st.tuples(*[st.integers(1, 10**6)] * 3).map(sorted))
def test_a_range_is_read_as_it_is_written(values: list[int]) -> None:
    low, usual, high = values
    assert parse_range(f"{low}:{usual}:{high}") == Range(min=low, opt=usual, max=high)
    assert parse_range(str(low)) == fixed(low)


@pytest.mark.parametrize("text", ["", "a", "1:2", "3:2:1", "0:1:2", "-1", "1:2:3:4", "1.5", "512-1024", "1::2", "²"])
def test_other_ranges_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="MIN:OPT:MAX"):
        parse_range(text)


def test_sdxls_sizes() -> None:
    sizes = default_sizes(128, 8, 64)
    assert str(sizes.height) == "512:1024:1280"
    assert sizes.width == sizes.height
    assert (str(sizes.batch), str(sizes.tokens)) == ("1", "77:77:231")


@given(st.integers(1, 256), st.sampled_from([4, 8, 16]), st.sampled_from([8, 32, 64, 128]))
def test_default_sizes_are_valid_for_the_unets(sample: int, factor: int, multiple: int) -> None:
    sizes = default_sizes(sample, factor, multiple)
    check_sizes(sizes, multiple)
    assert sizes.height.min <= sizes.height.opt <= sizes.height.max


def _unet(sizes: Sizes) -> tuple[Profile, ...]:
    return component_profiles(UNET, axes_of("unet", "fp16", sizes, 8))


def test_one_plan_serves_guidance_on_and_off_at_the_usual_size_and_then_a_range() -> None:
    off, on, span = _unet(default_sizes(128, 8, 64))
    assert off.shapes["sample"] == ((1, 4, 128, 128),) * 3
    assert on.shapes["sample"] == ((2, 4, 128, 128),) * 3
    assert on.shapes["encoder_hidden_states"] == ((2, 77, 2048),) * 3
    assert span.shapes["sample"] == ((1, 4, 64, 64), (2, 4, 128, 128), (2, 4, 160, 160))
    assert span.shapes["timestep"] == ((1,), (2,), (2,))
    assert span.shapes["encoder_hidden_states"] == ((1, 77, 2048), (2, 77, 2048), (2, 231, 2048))
    for rows in (1, 2):
        assert span.holds({"sample": (rows, 4, 128, 96), "timestep": (rows,)})
    assert not span.holds({"sample": (3, 4, 128, 128)})
    assert not span.holds({"sample": (2, 4, 168, 128)})
    assert not span.holds({"sample": (2, 4, 128)})


def test_a_range_that_adds_no_size_is_left_out() -> None:
    one = Sizes(height=fixed(1024), width=fixed(768), batch=fixed(1), tokens=fixed(77))
    assert [profile.shapes["timestep"][2][0] for profile in _unet(one)] == [1, 2]
    # Two pictures without guidance are 2 rows, with it 4; 3 rows are prompts that are combined.
    two = msgspec.structs.replace(one, batch=fixed(2))
    assert [profile.shapes["timestep"][0][0] for profile in _unet(two)] == [2, 4, 2]
    long = msgspec.structs.replace(one, tokens=Range(min=77, opt=77, max=154))
    assert len(_unet(long)) == 3


def test_a_static_plan_has_a_profile_for_each_number_of_rows() -> None:
    sizes = Sizes(height=fixed(1024), width=fixed(768), batch=fixed(3), tokens=fixed(77), static=True)
    profiles = component_profiles(UNET, axes_of("unet", "fp16", sizes, 8))
    assert [profile.shapes["sample"] for profile in profiles] == [((3, 4, 128, 96),) * 3, ((6, 4, 128, 96),) * 3]


DECODER = {"latent_sample": ("pictures", 4, "height", "width")}


def _decoded(precision: str, sizes: Sizes) -> list[tuple[int, ...]]:
    """Return the latent sizes of a decoder's profiles, each of which holds one size and one picture."""
    shapes = [
        p.shapes["latent_sample"] for p in component_profiles(DECODER, axes_of("vae_decoder", precision, sizes, 8))
    ]
    assert all(low == usual == high and low[:2] == (1, 4) for low, usual, high in shapes)
    return [usual[2:] for _, usual, _ in shapes]


def test_a_decoder_takes_the_usual_size_whole_and_tiles_for_the_rest() -> None:
    sizes = default_sizes(128, 8, 64)
    assert _decoded("fp16", sizes) == _decoded("bf16", sizes) == [(128, 128), (64, 64)]
    assert _decoded("fp32", sizes) == _decoded("mixed", sizes) == [(64, 64)]


def test_a_tile_fits_into_the_smallest_picture() -> None:
    sides = {"height": Range(min=256, opt=1024, max=1536), "width": Range(min=768, opt=768, max=768)}
    sizes = Sizes(**sides, batch=fixed(4), tokens=fixed(77))
    assert _decoded("fp16", sizes) == [(128, 96), (64, 64), (32, 64)]
    assert _decoded("fp32", sizes) == [(64, 64), (32, 64)]
    static = Sizes(**sides, batch=fixed(4), tokens=fixed(77), static=True)
    assert _decoded("fp16", static) == [(128, 96)]
    assert _decoded("fp32", static) == [(64, 64)]


def test_the_profiles_of_a_vae_encoder_are_in_pixels() -> None:
    encoder = {"sample": ("pictures", 3, "height", "width")}
    profiles = component_profiles(encoder, axes_of("vae_encoder", "fp16", default_sizes(128, 8, 64), 8))
    assert [profile.shapes["sample"][1] for profile in profiles] == [(1, 3, 1024, 1024), (1, 3, 512, 512)]


def test_the_error_for_invalid_sizes_names_valid_ones() -> None:
    sizes = Sizes(height=fixed(1000), width=fixed(1024), batch=fixed(1), tokens=fixed(77))
    with pytest.raises(SizeError, match="960 or 1024"):
        check_sizes(sizes, 64)
    sizes = Sizes(height=fixed(1024), width=fixed(1024), batch=fixed(1), tokens=fixed(80))
    with pytest.raises(SizeError, match="77"):
        check_sizes(sizes, 64)


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(UsageError, match="depth"):
        component_profiles({"sample": ("rows", "depth")}, [{"rows": fixed(1)}])


def test_an_input_without_a_profile_is_ignored() -> None:
    assert Profile(shapes={}).holds({"sample": (9, 9)})


def test_tokens_are_multiples_of_the_tokenizers_lengths() -> None:
    assert str(default_sizes(128, 8, 64, {248}).tokens) == "248:248:744"
    assert str(default_sizes(128, 8, 64, {77, 248}).tokens) == "77:77:744"
    sizes = Sizes(height=fixed(1024), width=fixed(1024), batch=fixed(1), tokens=fixed(154))
    check_sizes(sizes, 64, {77, 248})
    with pytest.raises(SizeError, match="chunks of 248; give"):
        check_sizes(sizes, 64, {248})


def test_a_text_encoder_takes_vectors_for_every_token_of_the_longest_prompt() -> None:
    sizes = default_sizes(128, 8, 64)
    inputs: dict[str, tuple[int | str, ...]] = {"input_ids": ("prompts", 77), "embeddings": ("vectors", 1280)}
    (profile,) = component_profiles(inputs, axes_of("text_encoder", "fp16", sizes, 8))
    assert profile.shapes["embeddings"] == ((1, 1280), (1, 1280), (248, 1280))
    # The profile of an older bundle's encoder, which has no such input, is unchanged.
    (older,) = component_profiles({"input_ids": ("prompts", 77)}, axes_of("text_encoder", "fp16", sizes, 8))
    assert older.shapes == {"input_ids": ((1, 77), (2, 77), (8, 77))}


def test_residuals_may_be_of_one_pixel_and_pictures_are_larger_than_latents() -> None:
    sizes = Sizes(height=Range(min=64, opt=128, max=256), width=fixed(128), batch=fixed(1), tokens=fixed(77))
    inputs = {"sample": ("rows", 4, "height", "width"), "picture": ("rows", 3, "8*height", "8*width"),
              "residual": ("rows|1", 9, "height/2|1", "width/2|1")}  # fmt: skip
    few, many, ranged = component_profiles(inputs, axes_of("unet", "fp16", sizes, 8))
    assert many.shapes["residual"] == ((1, 9, 1, 1), (2, 9, 8, 8), (2, 9, 8, 8))
    assert many.shapes["picture"] == ((2, 3, 128, 128),) * 3
    assert ranged.shapes["picture"] == ((1, 3, 64, 128), (2, 3, 128, 128), (2, 3, 256, 128))
    assert ranged.shapes["residual"] == ((1, 9, 1, 1), (2, 9, 8, 8), (2, 9, 16, 8))
    unused = {"sample": (2, 4, 16, 16), "picture": (2, 3, 128, 128), "residual": (1, 9, 1, 1)}
    assert choose_profile([few, many, ranged], unused) == 1, "without a ControlNet the usual profile is used"
