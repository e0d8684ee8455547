"""The choice of a profile for input shapes, and the one-line error if no profile fits."""

import pytest

from sdxl_trt.engines.bundle.manifest import Component, TensorSpec
from sdxl_trt.engines.bundle.profile import Profile, Range
from sdxl_trt.engines.errors import SizeError
from sdxl_trt.engines.plans.shapes import choose_profile, outside_profiles
from sdxl_trt.engines.plans.sizes import component_profiles

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
