"""The plans that `full_size.build` builds: their graphs and profiles."""

__all__ = ["SCHEMES", "BuildCase", "Export", "cases", "eight_bit_name", "profile_words", "rank_words"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from sdxl_trt.engines.bundle import Range, fixed
from sdxl_trt.engines.plans import Sizes, axes_of, default_sizes, rank_range

# SDXL: latent side of 1024² pictures, pixels per latent pixel, and the multiple of sides that base and refiner take.
_SIDE, _FACTOR, _MULTIPLE = 128, 8, 64
_TILE = 512 // _FACTOR
LORA_RANK = 128
SCHEMES: tuple[Literal["int8", "fp8"], ...] = ("int8", "fp8")


@dataclass(frozen=True)
class Export:
    """A bundle to build from: its folder under ``--work``, and export-engines' options.

    With `eight_bit`, the precision of its UNets, it is made of `floats`, with ranges that nobody measured: a plan does
    not depend on them, and to measure them is to draw at the real size.
    """

    name: str
    options: tuple[str, ...]
    eight_bit: Literal["int8", "fp8"] | None = None
    floats: "Export | None" = None


UNETS = Export("unets", ("--fp16", "--components", "unet,refiner_unet"))
EIGHT_BIT = tuple(Export(f"unets-{scheme}", (), scheme, UNETS) for scheme in SCHEMES)
VAES = {
    precision: Export(
        f"vae-{precision}",
        ("--fp16", "--no-refiner", "--components", "vae_decoder", "--vae-precision", precision),
    )
    for precision in ("fp16", "bf16", "fp32")
}


@dataclass(frozen=True)
class BuildCase:
    """One plan to build: a component of an export, and the ranges of all axes for each profile."""

    name: str
    export: Export
    component: str
    axes: tuple[dict[str, Range], ...]
    lora_rank: int = 0
    """The largest rank of LoRAs that the plan takes; 0 for a plan without slots."""


def cases() -> list[BuildCase]:
    """Return the plans to build, in order."""
    static = {"rows": fixed(2), "tokens": fixed(77)} | _square(_SIDE)
    default = default_sizes(_SIDE, _FACTOR, _MULTIPLE)
    four = msgspec.structs.replace(default, batch=Range(min=1, opt=1, max=4))
    both = msgspec.structs.replace(default, static=True)
    found = []
    for model, component in (("base", "unet"), ("refiner", "refiner_unet")):
        found += [
            BuildCase(f"{model} UNet, static", UNETS, component, (static,)),
            BuildCase(f"{model} UNet, dynamic", UNETS, component, _axes("unet", "fp16", default)[-1:]),
            BuildCase(f"{model} UNet, dynamic, batch 1:1:4", UNETS, component, _axes("unet", "fp16", four)[-1:]),
            BuildCase(f"{model} UNet, as exported", UNETS, component, _axes("unet", "fp16", default)),
            BuildCase(f"{model} UNet, --static", UNETS, component, _axes("unet", "fp16", both)),
        ]
    found += [
        BuildCase(eight_bit_name(model, export.eight_bit), export, component, (static,))
        for model, component in (("base", "unet"), ("refiner", "refiner_unet"))
        for export in EIGHT_BIT
        if export.eight_bit
    ]
    found += [
        BuildCase("base UNet for LoRAs, static", UNETS, "unet", (static,), LORA_RANK),
        BuildCase("base UNet for LoRAs, dynamic", UNETS, "unet", _axes("unet", "fp16", default)[-1:], LORA_RANK),
    ]
    whole = {"pictures": fixed(1)} | _square(_SIDE)
    found += [
        BuildCase(f"VAE decoder {precision}, static", VAES[precision], "vae_decoder", (whole,))
        for precision in ("fp16", "bf16", "fp32")
    ]
    tile = {"pictures": fixed(1)} | _square(_TILE)
    found.append(BuildCase("VAE decoder fp32, 512² tile", VAES["fp32"], "vae_decoder", (tile,)))
    # The cost of a range of sizes, and of what is built instead: one size, and tiles for all others.
    sides = {"height": default.height.over(_FACTOR), "width": default.width.over(_FACTOR)}
    found.append(
        BuildCase("VAE decoder bf16, dynamic", VAES["bf16"], "vae_decoder", ({"pictures": fixed(1), **sides},))
    )
    for precision in ("bf16", "fp32"):
        axes = _axes("vae_decoder", precision, default)
        found.append(BuildCase(f"VAE decoder {precision}, as exported", VAES[precision], "vae_decoder", axes))
    return found


def eight_bit_name(model: str, scheme: str) -> str:
    """Return the name of the case that builds a model's UNet in 8 bits."""
    return f"{model} UNet {scheme.upper()}, static"


def _square(side: int) -> dict[str, Range]:
    return {"height": fixed(side), "width": fixed(side)}


def _axes(kind: str, precision: str, sizes: Sizes) -> tuple[dict[str, Range], ...]:
    """Return the axes of the profiles that export-engines builds for `kind`."""
    return tuple(axes_of(kind, precision, sizes, _FACTOR))


def profile_words(axes: Mapping[str, Range]) -> str:
    """Return a profile's axes as text, sides in pixels."""
    sides = {name: axes[name].times(_FACTOR) for name in ("height", "width")}
    return ", ".join(f"{name} {axis}" for name, axis in (dict(axes) | sides).items())


def rank_words(lora_rank: int) -> str:
    """Return the ranks of LoRAs that a plan takes as text that follows its profiles, "" for one without slots."""
    return f", LoRA rank {rank_range(lora_rank)}" if lora_rank else ""
