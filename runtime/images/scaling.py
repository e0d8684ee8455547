"""Resize latents and pixels as ComfyUI does: with torch's interpolations, Lanczos, and bislerp.

Every method except "bislerp" is separable: a matrix of weights for each axis. Source: ``torch.nn.functional
.interpolate`` without aligned corners and without antialiasing; ComfyUI's ``comfy/utils.py`` for the rest.
"""

__all__ = ["new_size", "resize"]

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]
Axis = NDArray[np.float32]
Size = tuple[int, int]
_CUBIC = -0.75
"""torch's constant of the cubic convolution (Keys' a)."""
_PARALLEL = 1e-5
"""Two vectors are treated as parallel or opposite if their cosine is within this of 1 or -1."""


def new_size(size: Size, asked: Size | None, by: float, unit: int, least: int) -> Size:
    """Return the (height, width) that `size` is scaled to, in units of `unit` pixels (latents: 8, pixels: 1).

    `asked` is (width, height) in pixels. If one is 0, it follows from the other and the aspect ratio; if both are 0,
    nothing is scaled. None scales by the factor `by`. `least` pixels is the smallest side that is returned, also for
    the stated side if the other is 0.
    """
    height, width = size
    if asked is None:
        return max(round(height * by), 1), max(round(width * by), 1)
    wide, high = asked
    if wide == high == 0:
        return size
    if wide == 0:
        high = max(least, high)
        wide = max(least, round(width * high / height))
    elif high == 0:
        wide = max(least, wide)
        high = max(least, round(height * wide / width))
    elif least > 1:
        wide, high = max(least, wide), max(least, high)
    return max(high // unit, 1), max(wide // unit, 1)


def resize(values: Values, size: Size, method: str, *, centred: bool = False) -> Values:
    """Return new `values` (n, c, h, w) in `size` (height, width) by one of METHODS.

    With `centred` the longer side is first cropped on both ends to the new aspect ratio. "lanczos" is for pixels from 0
    to 1, and works in 256 steps. Raises KeyError for an unknown method.
    """
    cut = _cut(values, size) if centred else values
    if method == "bislerp":
        return _bislerp(_bislerp(cut, size[1]).swapaxes(2, 3), size[0]).swapaxes(2, 3)
    if method == "lanczos":
        return _lanczos(cut, size)
    weigh = METHODS[method]
    rows, columns = (weigh(old, new) for old, new in zip(cut.shape[2:], size, strict=True))
    # Rows first: fewer of them are left for the columns if a picture grows in width.
    scaled: Values = np.matmul(np.matmul(rows, cut.astype(np.float64)), columns.T).astype(np.float32)
    return scaled


def _cut(values: Values, size: Size) -> Values:
    """Return the centre of `values`, cropped to the aspect ratio of `size`."""
    height, width = values.shape[2:]
    shape, wanted = width / height, size[1] / size[0]
    left = round((width - width * (wanted / shape)) / 2) if shape > wanted else 0
    top = round((height - height * (shape / wanted)) / 2) if shape < wanted else 0
    return values[:, :, top : height - top, left : width - left]


def _nearest_exact(old: int, new: int) -> NDArray[np.float64]:
    """Return weights (new, old) that select the old value at the centre of each new one."""
    # In float32, as in torch: its rounding decides for a centre that falls between two values.
    at = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * _ratio(old, new)
    weights: NDArray[np.float64] = np.eye(old)[np.minimum(np.floor(at).astype(int), old - 1)]
    return weights


def _ratio(old: int, new: int) -> np.float32:
    return np.float32(old) / np.float32(new)


def _centres(old: int, new: int) -> Axis:
    """Return the positions of the centres of the `new` values among the `old` ones, rounded once, as in torch."""
    exact = np.float64(_ratio(old, new)) * (np.arange(new) + 0.5) - 0.5
    return exact.astype(np.float32)


def _neighbours(old: int, new: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Axis]:
    """Return the indices of the two old values around each new one, and the share of the second."""
    at = np.maximum(_centres(old, new), np.float32(0.0))
    low = np.minimum(at.astype(np.int64), old - 1)
    return low, np.minimum(low + 1, old - 1), np.clip(at - low.astype(np.float32), 0.0, 1.0).astype(np.float32)


def _bilinear(old: int, new: int) -> NDArray[np.float64]:
    low, high, share = _neighbours(old, new)
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new), low), 1.0 - share)
    np.add.at(weights, (np.arange(new), high), share)
    return weights


def _bicubic(old: int, new: int) -> NDArray[np.float64]:
    at = _centres(old, new)
    low = np.floor(at).astype(int)
    weights = np.zeros((new, old))
    for step in (-1, 0, 1, 2):
        place = np.clip(low + step, 0, old - 1)
        np.add.at(weights, (np.arange(new), place), _cubic(np.abs(at - low - step)))
    return weights


def _cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weight of a value at a `distance` of 0 to 2 in a cubic convolution."""
    near = ((_CUBIC + 2.0) * distance - (_CUBIC + 3.0)) * distance**2 + 1.0
    far = ((_CUBIC * distance - 5.0 * _CUBIC) * distance + 8.0 * _CUBIC) * distance - 4.0 * _CUBIC
    return np.where(distance <= 1.0, near, far)


def _area(old: int, new: int) -> NDArray[np.float64]:
    """Return weights that average the whole old values that each new one overlaps."""
    weights = np.zeros((new, old))
    for number in range(new):
        first, last = number * old // new, -((number + 1) * -old // new)
        weights[number, first:last] = 1.0 / (last - first)
    return weights


def _lanczos(values: Values, size: Size) -> Values:
    from PIL import Image  # noqa: PLC0415 - Pillow only where there is a picture

    made = []
    for each in values:
        pixels = np.clip(np.float32(255.0) * each.transpose(1, 2, 0), 0, 255).astype(np.uint8)
        scaled = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.LANCZOS)
        made.append(np.asarray(scaled, np.float32).transpose(2, 0, 1) / np.float32(255.0))
    return np.stack(made)


def _bislerp(values: Values, new: int) -> Values:
    """Return `values` (n, c, h, w) with `new` columns: slerp between the channel vectors of two old columns."""
    old = values.shape[3]
    low, high, between = _neighbours(old, new)
    # ComfyUI interpolates the column numbers and truncates them; only float32 finds the same columns.
    numbers = np.arange(old, dtype=np.float32)
    at, after = (
        each[low] * (np.float32(1.0) - between) + each[high] * between
        for each in (numbers, np.minimum(numbers + 1, np.float32(old - 1)))
    )
    first, second = values[..., at.astype(int)], values[..., after.astype(int)]
    share = at - np.floor(at)
    lengths = [np.sqrt((each**2).sum(axis=1, keepdims=True)) for each in (first, second)]
    units = [
        np.divide(each, length, out=np.zeros_like(each), where=length > 0)
        for each, length in zip((first, second), lengths, strict=True)
    ]
    dot = (units[0] * units[1]).sum(axis=1, keepdims=True)
    angle = np.arccos(np.clip(dot, -1.0, 1.0))
    sine = np.where(np.sin(angle) == 0.0, 1.0, np.sin(angle))
    turned = np.sin((1.0 - share) * angle) / sine * units[0] + np.sin(share * angle) / sine * units[1]
    turned *= lengths[0] * (1.0 - share) + lengths[1] * share
    line = first * (1.0 - share) + second * share
    mixed = np.where(dot > 1.0 - _PARALLEL, first, np.where(dot < _PARALLEL - 1.0, line, turned))
    return mixed.astype(np.float32)


METHODS: dict[str, Callable[[int, int], NDArray[np.float64]]] = {
    "nearest-exact": _nearest_exact,
    "bilinear": _bilinear,
    "area": _area,
    "bicubic": _bicubic,
}
"""The weights of a new axis over an old one; "lanczos" and "bislerp" exist besides."""
