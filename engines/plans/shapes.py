"""Choose the profile of a plan for given input shapes; the error if no profile fits."""

__all__ = ["Shapes", "choose_profile", "outside_profiles"]

from collections.abc import Mapping, Sequence

from sdxl_trt.engines.bundle import Component, Profile
from sdxl_trt.engines.errors import SizeError

Shapes = Mapping[str, tuple[int, ...]]
_SIDES = ("height", "width")


def choose_profile(profiles: Sequence[Profile], shapes: Shapes) -> int | None:
    """Return the index of the profile that holds `shapes` and is tuned nearest to them, or None if no profile fits."""
    holding = [i for i, profile in enumerate(profiles) if profile.holds(shapes)]
    return min(holding, key=lambda i: _distance(profiles[i], shapes), default=None)


def outside_profiles(
    name: str, component: Component, profiles: Sequence[Profile], shapes: Shapes, factor: int
) -> SizeError:
    """Return the error for `shapes` that no profile of component `name` holds; a latent is `factor` pixels wide."""
    in_latents = component.kind in ("unet", "vae_decoder")
    given = ", ".join(f"{axis} {size}" for axis, size in _axes(component, shapes).items())
    takes = " or ".join(dict.fromkeys(_span(component, profile, factor if in_latents else 1) for profile in profiles))
    return SizeError(f"{name}: the plan takes {takes}; {given} given: choose a size within, or build plans for it with"
                     " export-engines --engine tensorrt and --height, --width, --batch or --tokens")  # fmt: skip


def _distance(profile: Profile, shapes: Shapes) -> int:
    return sum(
        abs(size - usual)
        for name, shape in shapes.items()
        for size, usual in zip(shape, profile.shapes[name][1], strict=True)
    )


def _axes(component: Component, shapes: Shapes) -> dict[str, int]:
    """Return the size of every named axis of the inputs."""
    return {
        axis: size
        for spec in component.inputs
        for axis, size in zip(spec.shape, shapes[spec.name], strict=True)
        if isinstance(axis, str)
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
