"""Estimate a plan's activations before it is built, from a component's config and its profiles.

At its peak, a UNet holds the skip connections that its up blocks have yet to consume, a resnet's input, that input
normalized (in fp32), and its output; a decoder holds the same for its last resnet at full size. The factors below
scale these to the real builder's figures: benchmarks/full_size/activations.py compares the two, and
benchmarks/results/activations.md has the table. `estimate_error` returns how far estimates may be off.
"""

__all__ = ["estimate_activations", "estimate_each", "estimate_error", "largest_axes", "score_bytes"]

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sdxl_trt.engines.bundle import OF_LATENTS, Component, Precision, Profile, axis_root

Config = Mapping[str, Any]
# 8-bit layers read and write floats: their component counts with `float_precision`.
_ITEM: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "mixed": 4}
_WORKSPACE = 8 << 20  # in every plan, whatever its size
# Kernels for a range of shapes need more memory than those for one shape; so do kernels for few channels.
_UNET_STATIC, _UNET_NARROW, _UNET_DYNAMIC = 1.02, 1.45, 1.79
# A profile for one size needs more in a plan that also has a range: SDXL's UNets, 1 and 2 rows (results/build.md).
_UNET_BESIDE_RANGE = 1.31
_WITHOUT_ATTENTION = ("AutoencoderTiny",)
_NARROW, _NARROW_DECODER = 128, 64
_DECODER_STATIC, _DECODER_DYNAMIC = 1.0, {2: 2.3, 4: 1.4}
_TEXT_HIDDENS = 6.5
_SHALLOW_ERROR = 0.35
# Peak memory of ONNX Runtime's CPU provider on the embedded pair's UNets and decoder, 512² to 768², within 15 %.
_SCORES = 1.5
# The first layers of a ControlNet's picture: their channels, at the picture's resolution.
_CONDITION_WIDTH, _PIXELS_OF_LATENT = 16, 64
_WIDTHS = (320, 640, 1280, 1280)


def estimate_activations(component: Component, profiles: Iterable[Profile], precision: Precision | None = None) -> int:
    """Return an estimate, in bytes, of a plan's activations at the largest shapes of any of its `profiles`.

    `precision` overrides that of the component's floats, for a provider that computes in another.
    """
    return max(estimate_each(component, profiles, precision), default=0)


def estimate_each(component: Component, profiles: Iterable[Profile], precision: Precision | None = None) -> list[int]:
    """Return an estimate, in bytes, of the activations of each of the `profiles` of one plan, in their order."""
    item, together = _ITEM[precision or component.float_precision], list(profiles)
    ranged = not all(map(_is_static, together))
    return [_estimate(component, profile, item, ranged=ranged) for profile in together]


def estimate_error(component: Component) -> float:
    """Return the relative error, in either direction, of an estimate for this component."""
    if component.kind not in OF_LATENTS:
        return 0.1
    if component.kind == "shallow_unet":
        return _SHALLOW_ERROR
    # SDXL's base and refiner at full size need 6 to 13 % more than estimated: benchmarks/results/build.md.
    return 0.15 if _widths(component.config)[0] >= _NARROW else 0.2


def largest_axes(component: Component, profile: Profile) -> dict[str, int]:
    """Return the largest size of every named axis of a component's inputs, without those that follow from another."""
    return {
        axis: size
        for spec in component.inputs
        for axis, size in zip(spec.shape, profile.shapes[spec.name][2], strict=True)
        if isinstance(axis, str) and axis_root(axis) == axis
    }


def score_bytes(component: Component, profiles: Iterable[Profile], precision: Precision) -> int:
    """Return the bytes of the largest attention's scores and of softmax's buffers, if no kernel fuses the two."""
    scores = max((_scores(component, largest_axes(component, profile)) for profile in profiles), default=0)
    return int(_SCORES * scores) * _ITEM[precision]


def _is_static(profile: Profile) -> bool:
    # The residuals of a ControlNet may be of one pixel in every profile: their sizes say nothing about the others.
    shapes = {name: each for name, each in profile.shapes.items() if "residual" not in name}
    return all(low == high for low, _, high in shapes.values())


def _unet_factor(width: int, *, static: bool, ranged: bool) -> float:
    if not static:
        return _UNET_DYNAMIC
    if width < _NARROW:
        return _UNET_NARROW
    return _UNET_BESIDE_RANGE if ranged else _UNET_STATIC


def _estimate(component: Component, profile: Profile, item: int, *, ranged: bool) -> int:
    """Return the estimate for a profile of a plan; `ranged` states whether any of its profiles is for a range."""
    axes, widths = largest_axes(component, profile), _widths(component.config)
    static = _is_static(profile)
    places = axes.get("height", 1) * axes.get("width", 1)
    if component.kind in ("unet", "shallow_unet"):
        factor = _unet_factor(widths[0], static=static, ranged=ranged)
        shallow = component.kind == "shallow_unet"
        alive = _unet_bytes(component.config, item, shallow=shallow) * places * axes.get("rows", 1)
    elif component.kind == "controlnet":
        factor = _unet_factor(widths[0], static=static, ranged=ranged)
        alive = _controlnet_bytes(component.config, item) * places * axes.get("rows", 1)
    elif component.kind == "text_encoder":
        config, prompts = component.config, axes.get("prompts", 1)
        alive = config.get("hidden_size", 768) * item * prompts * config.get("max_position_embeddings", 77)
        factor = _TEXT_HIDDENS
    else:
        fused = static and widths[0] >= _NARROW_DECODER
        factor = _DECODER_STATIC if fused else _DECODER_DYNAMIC[item]
        # A decoder takes latents, an encoder pixels; both peak at pixel resolution.
        scale = 4 ** (len(widths) - 1) if component.kind == "vae_decoder" else 1
        alive = _decoder_channels(widths) * item * places * scale * axes.get("pictures", 1)
    return int(factor * alive) + _WORKSPACE


def _unet_bytes(config: Config, item: int, *, shallow: bool) -> float:
    """Return the peak bytes per latent pixel that a UNet holds, or only its outermost level, `item` bytes a value."""
    widths = _widths(config)
    layers = _per_level(config.get("layers_per_block", 2), len(widths))
    skips = list(_skips(widths, layers))
    hidden, most = widths[-1] / 4 ** (len(widths) - 1), 0.0
    for level in reversed(range(len(widths))):
        for _ in range(layers[level] + 1):
            wide = hidden + skips.pop()
            hidden = widths[level] / 4**level
            if level == 0 or not shallow:
                most = max(most, (wide + hidden + sum(skips)) * item + wide * 4)
        hidden *= 4  # upsampled for the next level
    return most


def _controlnet_bytes(config: Config, item: int) -> float:
    """Return the peak bytes per latent pixel that a ControlNet holds: its residuals, or its picture's first layers."""
    widths = _widths(config)
    layers = _per_level(config.get("layers_per_block", 2), len(widths))
    first = 2 * _CONDITION_WIDTH * _PIXELS_OF_LATENT
    return max(first, 2 * sum(_skips(widths, layers)) + 2 * widths[0]) * item + widths[0] * 4


def _skips(widths: Sequence[int], layers: Sequence[int]) -> Iterator[float]:
    """Yield the skip connections from down to up blocks, in channels at the first level's resolution."""
    yield widths[0]
    for level, width in enumerate(widths):
        for _ in range(layers[level]):
            yield width / 4**level
        if level + 1 < len(widths):
            yield width / 4 ** (level + 1)


def _decoder_channels(widths: Sequence[int]) -> int:
    """Return the channels at full size that an autoencoder holds at its peak: the last up block's first resnet."""
    return 2 * widths[min(1, len(widths) - 1)] + widths[0]


def _scores(component: Component, axes: Mapping[str, int]) -> int:
    """Return the number of scores of the largest self-attention of a graph."""
    config, places = component.config, axes.get("height", 1) * axes.get("width", 1)
    if component.kind == "text_encoder" or component.source.class_name in _WITHOUT_ATTENTION:
        return 0
    if component.kind in OF_LATENTS:
        blocks = config.get("down_block_types", ())
        # diffusers calls the number of heads their dimension.
        heads = _per_level(config.get("num_attention_heads") or config.get("attention_head_dim", 8), len(blocks))
        levels = [level for level, block in enumerate(blocks) if block.startswith("CrossAttn")
                  and (level == 0 or component.kind != "shallow_unet")]  # fmt: skip
        return axes.get("rows", 1) * max((heads[level] * (places // 4**level) ** 2 for level in levels), default=0)
    latents = places if component.kind == "vae_decoder" else places // 4 ** (len(_widths(config)) - 1)
    return axes.get("pictures", 1) * latents**2


def _widths(config: Config) -> Sequence[int]:
    widths: Sequence[int] = config.get("block_out_channels", _WIDTHS)
    return widths


def _per_level(value: int | Sequence[int], levels: int) -> list[int]:
    return [value] * levels if isinstance(value, int) else list(value)
