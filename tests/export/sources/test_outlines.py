"""UNets with fewer blocks than SDXL's, recognized by the names of their tensors."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.adapters.unet_names import unet_prefixes
from sdxl_trt.engines.errors import SourceError
from sdxl_trt.export.sources.configs import PUBLISHED
from sdxl_trt.export.sources.outlines import Outline, config_of, read_outline

SDXL: dict[str, Any] = json.loads((PUBLISHED / "base" / "unet" / "config.json").read_bytes())
REFINER: dict[str, Any] = json.loads((PUBLISHED / "refiner" / "unet" / "config.json").read_bytes())
NONE = (None, None)
SSD_1B = Outline((NONE, (2, 2), (4, 4)), 0, ((4, 4, 10), (2, 1, 1), (None,) * 3))
VEGA = Outline((NONE, (1, 1), (2, 2)), 0, ((2, 2, 2), (1, 1, 1), (None,) * 3))
KOALA = Outline(((None,), (2,), (5,)), 5, ((5, 5), (2, 2), NONE))
TINY = {
    "sample_size": 8, "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "norm_num_groups": 4,
    "cross_attention_dim": 8, "projection_class_embeddings_input_dim": 32, "attention_head_dim": 4,
}  # fmt: skip


def _names(config: dict[str, Any], *, ldm: bool) -> list[str]:
    """Return the names of a UNet's tensors, LDM's or diffusers'; test_ldm compares them with the modules."""
    names = unet_prefixes(config)
    return [f"{name}.weight" for name in (names if ldm else names.values())]


@pytest.mark.parametrize(
    ("outline", "name"), [(SSD_1B, "SSD-1B"), (VEGA, "Segmind-Vega"), (KOALA, "a UNet of its own outline")]
)
@pytest.mark.parametrize("ldm", [False, True])
def test_each_published_outline_is_recognized(outline: Outline, name: str, ldm: bool) -> None:
    config, called = config_of(SDXL, outline, "x")
    assert called == name
    assert read_outline(_names(config, ldm=ldm)) == outline


@pytest.mark.parametrize("config", [SDXL, REFINER], ids=["base", "refiner"])
def test_a_complete_unet_keeps_the_published_config(config: dict[str, Any]) -> None:
    back = unet_prefixes(config)
    outline = read_outline(f"{name}.weight" for name in back)
    assert config_of(config, outline, "x") == (config, "")
    assert read_outline(f"{name}.weight" for name in back.values()) == outline


@st.composite
def _configs(draw: st.DrawFn) -> dict[str, Any]:
    levels = draw(st.integers(1, 3))
    layers = draw(st.lists(st.integers(1, 2), min_size=levels, max_size=levels))
    attends = draw(st.lists(st.booleans(), min_size=levels, max_size=levels))
    depth = st.integers(1, 3)
    depths = [[draw(depth) for _ in range(count)] for count in layers]
    middle = draw(st.sampled_from(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None]))
    return TINY | {
        "block_out_channels": [4] * levels, "layers_per_block": layers, "mid_block_type": middle,
        "down_block_types": ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in attends[::-1]],
        "transformer_layers_per_block": depths,
        "reverse_transformer_layers_per_block": [[draw(depth) for _ in range(n + 1)] for n in layers[::-1]],
    }  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(config=_configs(), ldm=st.booleans())
def test_any_unet_that_diffusers_builds_is_read_from_its_names(config: dict[str, Any], ldm: bool) -> None:
    """The template has the levels and the widths; the rest is read from the names."""
    names = _names(config, ldm=ldm)
    levels = len(config["block_out_channels"])
    template = config | {
        "layers_per_block": 2, "transformer_layers_per_block": 4, "reverse_transformer_layers_per_block": None,
        "down_block_types": ["CrossAttnDownBlock2D"] * levels, "up_block_types": ["CrossAttnUpBlock2D"] * levels,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
    }  # fmt: skip
    found, _ = config_of(template, read_outline(names), "test")
    assert unet_prefixes(found) == unet_prefixes(config)


@pytest.mark.parametrize(
    "outline",
    [Outline((NONE, (2, None), (4, 4)), 0, SSD_1B.up), Outline(SSD_1B.down, 3, SSD_1B.up),
     Outline(SSD_1B.down, 0, ((4, 4), (2, 1, 1), (None,) * 3))],
    ids=["half a level", "another middle", "a layer short"],
)  # fmt: skip
def test_outlines_that_diffusers_cannot_build_are_refused(outline: Outline) -> None:
    with pytest.raises(SourceError, match="SDXL's UNet cannot have; is the checkpoint complete"):
        config_of(SDXL, outline, "x")


def test_missing_layers_give_no_outline() -> None:
    """An entirely missing block is damage: the check against the published config then names the missing tensor."""
    names = [f"{name}.weight" for name in unet_prefixes(SDXL)]
    for gone in ("input_blocks.3.", "output_blocks.0.", "input_blocks.1."):
        assert config_of(SDXL, read_outline(name for name in names if not name.startswith(gone)), "x")[0] == SDXL
    assert read_outline(["decoder.conv_in.weight"]) is None
