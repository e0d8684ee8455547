"""The sizes that a user requests for plans, and the profiles of each graph's inputs that follow from them.

Profiles limit plans only: ONNX Runtime accepts every size that the graph accepts.
"""

__all__ = [
    "ADAPTED",
    "MAX_ROWS_OF_PROMPTS",
    "MAX_VECTORS",
    "MOST_RANK",
    "SUGGESTED_RANK",
    "TILE",
    "TOKENS",
    "Sizes",
    "axes_of",
    "check_for",
    "check_sizes",
    "component_profiles",
    "default_sizes",
    "parse_range",
    "profiles_of",
    "rank_range",
    "size_multiple",
    "stage_sizes",
]

import math
from collections.abc import Collection, Mapping

from sdxl_trt.engines.bundle import (
    OF_LATENTS,
    Axes,
    Component,
    Kind,
    Manifest,
    Profile,
    Range,
    Record,
    Shape,
    axis_range,
    axis_root,
    fixed,
)
from sdxl_trt.engines.errors import (
    SizeError,
    UsageError,
)

# fp32 and mixed decoders work in tiles of this many pixels: a whole picture needs gigabytes of activations.
TILE = 512
TOKENS = 77
"""Tokens per chunk of SDXL's own text encoders; a Long-CLIP encoder takes 248."""
ADAPTED: tuple[Kind, ...] = ("unet", "shallow_unet", "text_encoder")
"""The kinds of components that LoRAs change."""
USUAL_RANK = 16
"""The rank that plans for LoRAs are tuned for."""
SUGGESTED_RANK, MOST_RANK = 128, 1024
"""The rank that commands in messages build plans for, and the largest that can be asked for."""
MAX_ROWS_OF_PROMPTS = 8
"""A text encoder's activations are small: several prompts share a call."""
MAX_VECTORS = 248
"""Vectors of textual inversion embeddings in one call of a text encoder: as many as its longest prompt has tokens."""


class Sizes(Record, frozen=True, kw_only=True):
    """The sizes that plans are built for: picture sides in pixels, pictures per call, prompt tokens.

    A UNet's plan has a profile of the usual size for guidance off (batch rows) and one for guidance on (twice as many),
    and then one for the whole range; `static` leaves the last one out.
    """

    height: Range
    width: Range
    batch: Range
    tokens: Range
    static: bool = False


def rank_range(lora_rank: int) -> Range:
    """Return the ranks that a plan for LoRAs of up to `lora_rank` takes: a request without LoRAs runs another plan."""
    return Range(min=1, opt=min(USUAL_RANK, lora_rank), max=lora_rank)


def parse_range(text: str) -> Range:
    """Parse ``MIN:OPT:MAX`` or one number. Raises UsageError."""
    parts = text.split(":")
    try:
        values = [int(part) for part in parts]
    except ValueError:
        values = []
    if len(values) not in (1, 3) or any(value < 1 for value in values) or values != sorted(values):
        raise UsageError(f"{text}: give one number, or MIN:OPT:MAX in ascending order (512:1024:1280)")
    low, usual, high = values if len(values) == 3 else values * 3
    return Range(min=low, opt=usual, max=high)


def default_sizes(sample_size: int, factor: int, multiple: int, lengths: Collection[int] = (TOKENS,)) -> Sizes:
    """Return the sizes for a model trained on `sample_size` latents of `factor` pixels, in multiples of `multiple`.

    The usual side is the model's own, the smallest half of it, the largest a quarter more; one picture per call; one
    to three prompt chunks of the tokenizers' `lengths`.
    """
    side = sample_size * factor
    usual = max(side // multiple, 1) * multiple
    low = max(math.ceil(side / 2 / multiple), 1) * multiple
    high = max(int(side * 1.25) // multiple, usual // multiple) * multiple
    sides = Range(min=min(low, usual), opt=usual, max=high)
    tokens = Range(min=min(lengths), opt=min(lengths), max=3 * max(lengths))
    return Sizes(height=sides, width=sides, batch=fixed(1), tokens=tokens)


def check_sizes(sizes: Sizes, multiple: int, lengths: Collection[int] = (TOKENS,)) -> None:
    """Raise SizeError unless sides are multiples of `multiple` and token counts multiples of one of `lengths`."""
    for option, sides in (("--height", sizes.height), ("--width", sizes.width)):
        for side in (sides.min, sides.opt, sides.max):
            if side % multiple:
                below = max(side // multiple, 1) * multiple
                raise SizeError(f"{option} {sides}: the UNets take multiples of {multiple}; {side} would be"
                                f" {below} or {below + multiple}")  # fmt: skip
    for count in (sizes.tokens.min, sizes.tokens.opt, sizes.tokens.max):
        if all(count % length for length in lengths):
            chunks = " or ".join(map(str, sorted(lengths)))
            raise SizeError(f"--tokens {sizes.tokens}: prompts come in chunks of {chunks}; give a multiple")


def axes_of(kind: str, precision: str, sizes: Sizes, factor: int) -> list[dict[str, Range]]:
    """Return the range of every named input axis, one dict per profile, for a graph of `kind`.

    `precision` is that of its floats, since between 8-bit layers lie floats.

    Profiles for one size come first: their kernels are faster and their activations smaller than those for a range, and
    `choose_profile` takes the first of profiles that suit equally.
    """
    if kind in OF_LATENTS:
        return _unet_axes(sizes, factor)
    if kind == "text_encoder":
        # Most prompts name no embedding: the plan is tuned for the one vector that is passed then.
        vectors = Range(min=1, opt=1, max=MAX_VECTORS)
        return [{"prompts": Range(min=1, opt=2, max=MAX_ROWS_OF_PROMPTS), "vectors": vectors}]
    unit = factor if kind == "vae_decoder" else 1
    wide = precision in ("fp32", "mixed")
    return [
        {"pictures": fixed(1), "height": fixed(height // unit), "width": fixed(width // unit)}
        for height, width in _vae_sizes(sizes, wide=wide)
    ]


def _unet_axes(sizes: Sizes, factor: int) -> list[dict[str, Range]]:
    common = {"height": sizes.height.over(factor), "width": sizes.width.over(factor), "tokens": sizes.tokens}
    usual = {name: fixed(axis.opt) for name, axis in common.items()}
    few, many = sizes.batch.opt, 2 * sizes.batch.opt
    static = [{**usual, "rows": fixed(few)}, {**usual, "rows": fixed(many)}]
    rows = Range(min=sizes.batch.min, opt=many, max=2 * sizes.batch.max)
    # A range of one size, and of these two numbers of rows only, adds nothing but build time.
    covered = common == usual and {few, many}.issuperset(range(rows.min, rows.max + 1))
    return static if sizes.static or covered else [*static, {**common, "rows": rows}]


def _vae_sizes(sizes: Sizes, *, wide: bool) -> list[tuple[int, int]]:
    """Return the (height, width) profiles of an autoencoder: the usual picture size, and tiles for all others.

    Its activations are the largest of all, and three times as large for a range of sizes as for one size. It takes
    one picture at a time: whole at the usual size unless the dtype is `wide`, in tiles at other sizes.
    """
    usual = (sizes.height.opt, sizes.width.opt)
    tile = (min(usual[0], TILE), min(usual[1], TILE))
    smallest = (min(sizes.height.min, TILE), min(sizes.width.min, TILE))
    chosen = [tile] if wide else [usual]
    return list(dict.fromkeys(chosen if sizes.static else [*chosen, tile, smallest]))


def component_profiles(
    inputs: Mapping[str, tuple[int | str, ...]], axes: list[dict[str, Range]]
) -> tuple[Profile, ...]:
    """Return one profile per dict of `axes` for a graph whose `inputs` have these shapes. Raises UsageError."""
    return tuple(Profile(shapes={name: _shapes(shape, each) for name, shape in inputs.items()}) for each in axes)


def _shapes(shape: tuple[int | str, ...], axes: Axes) -> tuple[Shape, Shape, Shape]:
    unknown = [axis for axis in shape if isinstance(axis, str) and axis_root(axis) not in axes]
    if unknown:
        raise UsageError(f"the graph has an axis {unknown[0]!r} that profiles do not cover; export it again")
    ranges = [axis_range(axis, axes) for axis in shape]
    return (
        tuple(axis.min for axis in ranges),
        tuple(axis.opt for axis in ranges),
        tuple(axis.max for axis in ranges),
    )


def stage_sizes(manifest: Manifest) -> Sizes:
    """Return the default sizes for a bundle: sizes that both base and refiner accept."""
    base = manifest.base
    return default_sizes(base.sample_size, base.vae.factor, size_multiple(manifest), manifest.prompt_lengths())


def size_multiple(manifest: Manifest) -> int:
    """Return the pixels that picture sides must be a multiple of, for all UNets of a bundle."""
    return math.lcm(*(stage.size_multiple for stage in manifest.stages().values()))


def check_for(manifest: Manifest, sizes: Sizes) -> None:
    """Raise SizeError for sizes that the UNets of a bundle do not accept."""
    check_sizes(sizes, size_multiple(manifest), manifest.prompt_lengths())


def profiles_of(component: Component, sizes: Sizes, factor: int) -> tuple[Profile, ...]:
    """Return the profiles of a component's graph for `sizes`; `factor` is pixels per latent."""
    shapes = {spec.name: spec.shape for spec in component.inputs}
    return component_profiles(shapes, axes_of(component.kind, component.float_precision, sizes, factor))
