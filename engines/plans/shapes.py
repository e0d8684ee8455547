"""Choose the profile of a plan for given input shapes, or for the sizes of a run; the error if no profile fits."""

__all__ = ["RunSizes", "Shapes", "choose_profile", "outside_profiles", "profile_for_run", "reachable", "usual_profile"]

import math
from collections.abc import Mapping, Sequence

from sdxl_trt.engines.bundle import OF_LATENTS, Component, Positive, Profile, Record, axis_root, axis_size
from sdxl_trt.engines.errors import SizeError

Shapes = Mapping[str, tuple[int, ...]]
_SIDES = ("height", "width")


class RunSizes(Record, frozen=True, kw_only=True):
    """The sizes of a run: a picture's sides in pixels, the rows of a UNet's largest call, the tokens of the prompts."""

    height: Positive
    width: Positive
    rows: Positive
    tokens: Positive


def choose_profile(profiles: Sequence[Profile], shapes: Shapes) -> int | None:
    """Return the index of the profile that holds `shapes` and is tuned nearest to them, or None if no profile fits.

    Of profiles that are equally near, the first is chosen; plans have their profiles for one size before the others.
    """
    holding = [i for i, profile in enumerate(profiles) if profile.holds(shapes)]
    return min(holding, key=lambda i: _distance(profiles[i], shapes), default=None)


def usual_profile(profiles: Sequence[Profile]) -> int:
    """Return the index of the profile of ordinary runs: the first of those that are tuned for the largest shapes."""
    return max(range(len(profiles)), key=lambda i: sum(math.prod(each[1]) for each in profiles[i].shapes.values()))


def profile_for_run(name: str, component: Component, profiles: Sequence[Profile], run: RunSizes, factor: int) -> int:
    """Return the index of the profile that needs most memory in a run of these sizes; a latent is `factor` pixels wide.

    An autoencoder takes a picture of another size than its own in tiles. Raises SizeError if a UNet does not take it.
    """
    if component.kind == "text_encoder":
        return usual_profile(profiles)
    unit = 1 if component.kind == "vae_encoder" else factor
    axes = {"height": run.height // unit, "width": run.width // unit, "rows": run.rows, "tokens": run.tokens}
    if component.kind not in OF_LATENTS:
        return _tile_profile(component, profiles, (axes["height"], axes["width"]))
    shapes = {spec.name: tuple(axis_size(axis, axes) for axis in spec.shape) for spec in component.inputs}
    chosen = choose_profile(profiles, shapes)
    if chosen is None:
        raise outside_profiles(name, component, profiles, shapes, factor)
    return chosen


def _tile_profile(component: Component, profiles: Sequence[Profile], picture: tuple[int, int]) -> int:
    """Return the index of the profile with the largest tile that fits into the `picture`, or else the smallest tile."""
    (spec,) = component.inputs
    sides = [(profile.shapes[spec.name][0][-2:], profile.shapes[spec.name][2][-2:]) for profile in profiles]
    fitting = [i for i, (low, _) in enumerate(sides) if low[0] <= picture[0] and low[1] <= picture[1]]
    if not fitting:
        return min(range(len(sides)), key=lambda i: math.prod(sides[i][0]))
    return max(fitting, key=lambda i: math.prod(map(min, sides[i][1], picture)))


def reachable(profiles: Sequence[Profile]) -> list[Profile]:
    """Return the profiles that some shapes choose, each tuned for shapes that choose it.

    A profile for a range is tuned for the usual size, which chooses the profile for that size alone: it is returned as
    tuned for its smallest shapes, and left out if they too choose another.
    """
    found = []
    for index, profile in enumerate(profiles):
        for which in (1, 0):
            shapes = {name: each[which] for name, each in profile.shapes.items()}
            if choose_profile(profiles, shapes) == index:
                found.append(Profile(shapes={name: (each[0], each[which], each[2])
                                             for name, each in profile.shapes.items()}))  # fmt: skip
                break
    return found


def outside_profiles(
    name: str, component: Component, profiles: Sequence[Profile], shapes: Shapes, factor: int
) -> SizeError:
    """Return the error for `shapes` that no profile of component `name` holds; a latent is `factor` pixels wide."""
    in_latents = component.kind in (*OF_LATENTS, "vae_decoder")
    given = ", ".join(f"{axis} {size}" for axis, size in _axes(component, shapes).items())
    widest = [one for one in profiles if not any(_wider(other, one) for other in profiles)]
    takes = " or ".join(dict.fromkeys(_span(component, profile, factor if in_latents else 1) for profile in widest))
    return SizeError(f"{name}: the plan takes {takes}; {given} given: choose a size within, or build plans for it with"
                     " export-engines --engine tensorrt and --height, --width, --batch or --tokens")  # fmt: skip


def _wider(profile: Profile, other: Profile) -> bool:
    """Return whether `profile` holds all shapes that `other` holds, and more."""
    ends = [{name: each[end] for name, each in one.shapes.items()} for one in (other, profile) for end in (0, 2)]
    return all(map(profile.holds, ends)) and not all(map(other.holds, ends))


def _distance(profile: Profile, shapes: Shapes) -> int:
    return sum(
        abs(size - usual)
        for name, shape in shapes.items()
        for size, usual in zip(shape, profile.shapes[name][1], strict=True)
    )


def _axes(component: Component, shapes: Shapes) -> dict[str, int]:
    """Return the size of every named axis of the inputs, without those that follow from another."""
    return {
        axis: size
        for spec in component.inputs
        for axis, size in zip(spec.shape, shapes[spec.name], strict=True)
        if isinstance(axis, str) and axis_root(axis) == axis
    }


def _span(component: Component, profile: Profile, factor: int) -> str:
    low, high = (
        _axes(component, {name: shapes[end] for name, shapes in profile.shapes.items()}) for end in (0, 2)
    )  # fmt: skip
    return ", ".join(f"{axis} {_range(low[axis], high[axis])}{_pixels(axis, low, high, factor)}" for axis in low)


def _pixels(axis: str, low: Mapping[str, int], high: Mapping[str, int], factor: int) -> str:
    if axis not in _SIDES or factor == 1:
        return ""
    return f" ({_range(low[axis] * factor, high[axis] * factor)} pixels)"


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"
