"""The choice of a profile for input shapes, and the one-line error if no profile fits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.bundle.manifest import Component, TensorSpec
from sdxl_trt.engines.bundle.profile import Profile, Range
from sdxl_trt.engines.errors import SizeError
from sdxl_trt.engines.plans.shapes import (
    RunSizes,
    choose_profile,
    outside_profiles,
    profile_for_run,
    reachable,
    usual_profile,
)
from sdxl_trt.engines.plans.sizes import Sizes, axes_of, component_profiles

INPUTS = {"sample": ("rows", 4, "height", "width"), "timestep": ("rows",)}


def _range(low: int, usual: int, high: int) -> Range:
    return Range(min=low, opt=usual, max=high)


def _profiles(*axes: tuple[tuple[int, int, int], tuple[int, int, int]]) -> tuple[Profile, ...]:
    """Return one profile for each pair of rows and sides."""
    ranges = [{"rows": _range(*rows), "height": _range(*side), "width": _range(*side)} for rows, side in axes]
    return component_profiles(INPUTS, ranges)


def _shapes(rows: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
    return {"sample": (rows, 4, height, width), "timestep": (rows,)}


STATIC = _profiles(((1, 1, 1), (16, 16, 16)), ((2, 2, 2), (16, 16, 16)))
WIDE = _profiles(((1, 2, 2), (8, 16, 16)))
OVERLAPPING = _profiles(((1, 2, 8), (8, 16, 32)), ((1, 4, 4), (8, 24, 32)))


@pytest.mark.parametrize(
    ("profiles", "shapes", "chosen"),
    [
        (STATIC, _shapes(1, 16, 16), 0),
        (STATIC, _shapes(2, 16, 16), 1),
        (STATIC, _shapes(3, 16, 16), None),
        (WIDE, _shapes(1, 8, 12), 0),
        (WIDE, _shapes(1, 8, 17), None),
        (WIDE, _shapes(1, 7, 8), None),
        (OVERLAPPING, _shapes(2, 16, 16), 0),
        (OVERLAPPING, _shapes(4, 24, 24), 1),
        (OVERLAPPING, _shapes(8, 24, 24), 0),
    ],
)
def test_the_profile_tuned_nearest_is_chosen(profiles, shapes, chosen: int | None) -> None:
    assert choose_profile(profiles, shapes) == chosen


UNET = {"sample": ("rows", 4, "height", "width"), "timestep": ("rows",), "hidden": ("rows", "tokens", 8)}


def _ranges(least: int, most: int, unit: int = 1) -> st.SearchStrategy[Range]:
    three = st.tuples(*[st.integers(least, most)] * 3).map(sorted)
    return three.map(lambda values: _range(*(value * unit for value in values)))


all_sizes = st.builds(
    Sizes, height=_ranges(1, 6, 64), width=_ranges(1, 6, 64), batch=_ranges(1, 3), tokens=_ranges(1, 3, 77),
    static=st.booleans(),
)  # fmt: skip


def _unet(sizes: Sizes) -> tuple[Profile, ...]:
    return component_profiles(UNET, axes_of("unet", "fp16", sizes, 8))


def _run(rows: int, height: int, width: int, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"sample": (rows, 4, height // 8, width // 8), "timestep": (rows,), "hidden": (rows, tokens, 8)}


@settings(max_examples=30)
@given(all_sizes)
def test_the_usual_size_chooses_the_profile_for_it_alone(sizes: Sizes) -> None:
    profiles = _unet(sizes)
    for rows in (sizes.batch.opt, 2 * sizes.batch.opt):
        shapes = _run(rows, sizes.height.opt, sizes.width.opt, sizes.tokens.opt)
        chosen = choose_profile(profiles, shapes)
        assert chosen is not None
        assert all(low == size == high for (low, _, high), size in zip(
            (profiles[chosen].shapes[name] for name in shapes), shapes.values(), strict=True))  # fmt: skip


@settings(max_examples=50)
@given(all_sizes, st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), st.integers(1, 4))
def test_some_profile_takes_what_is_in_range_and_none_takes_more(
    sizes: Sizes, rows: int, height: int, width: int, tokens: int
) -> None:
    height, width, tokens = 64 * height, 64 * width, 77 * tokens
    inside = height in sizes.height and width in sizes.width and tokens in sizes.tokens
    inside &= sizes.batch.min <= rows <= 2 * sizes.batch.max
    if sizes.static:
        usual = (sizes.height.opt, sizes.width.opt, sizes.tokens.opt)
        inside = (height, width, tokens) == usual and rows in (sizes.batch.opt, 2 * sizes.batch.opt)
    assert (choose_profile(_unet(sizes), _run(rows, height, width, tokens)) is not None) == inside


@settings(max_examples=30)
@given(all_sizes)
def test_the_usual_profile_is_the_one_for_guidance_at_the_usual_size(sizes: Sizes) -> None:
    profiles = _unet(sizes)
    shapes = _run(2 * sizes.batch.opt, sizes.height.opt, sizes.width.opt, sizes.tokens.opt)
    assert usual_profile(profiles) == choose_profile(profiles, shapes)


@settings(max_examples=30)
@given(all_sizes)
def test_each_reachable_profile_is_tuned_for_shapes_that_choose_it(sizes: Sizes) -> None:
    profiles = _unet(sizes)
    found = reachable(profiles)
    chosen = [choose_profile(profiles, {name: each[1] for name, each in one.shapes.items()}) for one in found]
    assert chosen == sorted(set(chosen))
    for index, one in zip(chosen, found, strict=True):
        assert {name: each[::2] for name, each in one.shapes.items()} == {
            name: each[::2] for name, each in profiles[index].shapes.items()
        }


def test_a_range_is_tried_at_its_smallest_shapes() -> None:
    sides = _range(512, 1024, 1280)
    profiles = _unet(Sizes(height=sides, width=sides, batch=_range(1, 1, 1), tokens=_range(77, 77, 231)))
    tuned = [one.shapes["sample"][1] for one in reachable(profiles)]
    assert tuned == [(1, 4, 128, 128), (2, 4, 128, 128), (1, 4, 64, 64)]


def _component_with(component_of, kind: str, inputs: dict[str, tuple[int | str, ...]]) -> Component:
    import msgspec

    specs = tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in inputs.items())
    return msgspec.structs.replace(component_of(kind, 1), inputs=specs)


def test_a_run_uses_the_profile_of_its_sizes(component_of) -> None:
    sides = _range(512, 1024, 1280)
    profiles = _unet(Sizes(height=sides, width=sides, batch=_range(1, 1, 1), tokens=_range(77, 77, 231)))
    unet = _component_with(component_of, "unet", UNET)
    for rows, height, tokens, expected in ((1, 1024, 77, 0), (2, 1024, 77, 1), (2, 1024, 154, 2), (2, 768, 77, 2)):
        run = RunSizes(height=height, width=1024, rows=rows, tokens=tokens)
        assert profile_for_run("unet", unet, profiles, run, 8) == expected
    with pytest.raises(SizeError, match=r"refiner_unet: .* height 192, .* given") as raised:
        profile_for_run("refiner_unet", unet, profiles, RunSizes(height=1536, width=1024, rows=2, tokens=77), 8)
    assert str(raised.value).startswith(
        "refiner_unet: the plan takes rows 1 to 2, height 64 to 160 (512 to 1280 pixels)"
    )
    assert " or rows" not in str(raised.value), "the range holds the other profiles"


@pytest.mark.parametrize(("kind", "unit"), [("vae_decoder", 8), ("vae_encoder", 1)])
def test_an_autoencoder_uses_the_largest_tile_that_fits(component_of, kind: str, unit: int) -> None:
    inputs = {"sample": ("pictures", 4, "height", "width")}
    sides = _range(256, 1024, 1280)
    sizes = Sizes(height=sides, width=sides, batch=_range(1, 1, 1), tokens=_range(77, 77, 231))
    profiles = component_profiles(inputs, axes_of(kind, "fp16", sizes, 8))
    assert [profile.shapes["sample"][1][2] * unit for profile in profiles] == [1024, 512, 256]
    vae = _component_with(component_of, kind, inputs)
    for height, width, expected in ((1024, 1024, 0), (1280, 1280, 0), (1280, 768, 1), (384, 1280, 2), (128, 128, 2)):
        run = RunSizes(height=height, width=width, rows=2, tokens=77)
        assert profile_for_run("vae", vae, profiles, run, 8) == expected, (height, width)


def _component(component_of, kind: str) -> Component:
    import msgspec

    inputs = tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in INPUTS.items())
    return msgspec.structs.replace(component_of(kind, 1), inputs=inputs)


@pytest.mark.parametrize(
    ("kind", "profiles", "text"),
    [
        ("unet", WIDE, "unet: the plan takes rows 1 to 2, height 8 to 16 (64 to 128 pixels), width 8 to 16"),
        ("unet", WIDE, "; rows 1, height 8, width 17 given: choose a size within, or build plans for it with"),
        ("unet", STATIC, "the plan takes rows 1, height 16 (128 pixels), width 16 (128 pixels) or rows 2, height 16"),
        ("vae_decoder", WIDE, "height 8 to 16 (64 to 128 pixels)"),
        ("vae_encoder", WIDE, "height 8 to 16, width 8 to 16;"),
    ],
)
def test_the_error_names_the_accepted_sizes(component_of, kind: str, profiles, text: str) -> None:
    error = outside_profiles("unet", _component(component_of, kind), profiles, _shapes(1, 8, 17), 8)
    assert isinstance(error, SizeError)
    assert text in str(error)
    assert "\n" not in str(error)
