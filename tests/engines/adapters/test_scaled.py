"""LoRAs with scales as values: what is equal, and what has an effect on a component."""

from dataclasses import replace
from pathlib import Path

from sdxl_trt.engines.adapters.file import Lora
from sdxl_trt.engines.adapters.kinds import Branch
from sdxl_trt.engines.adapters.names import LoraComponent, Place
from sdxl_trt.engines.adapters.scaled import ScaledLora, narrowed


def _lora(name: str, *components: LoraComponent) -> Lora:
    branches = {each: (Branch(Place(each, "a", ""), "difference", {}),) for each in components}
    return Lora(Path(f"{name}.safetensors"), name * 64, branches)


BOTH, UNET = _lora("a", "unet", "text_encoder"), _lora("b", "unet")


def test_loras_are_equal_by_content_and_scales() -> None:
    moved = replace(BOTH, path=Path("elsewhere/other.safetensors"))
    assert ScaledLora(moved, 0.5) == ScaledLora(BOTH, 0.5)
    assert len({ScaledLora(moved, 0.5), ScaledLora(BOTH, 0.5), ScaledLora(BOTH, 0.6), ScaledLora(UNET, 0.5)}) == 3


def test_only_what_changes_a_component_counts() -> None:
    loras = (ScaledLora(BOTH, 0.5, 0.0), ScaledLora(UNET, 0.7), ScaledLora(BOTH, 0.0, 0.2))
    assert narrowed(loras, "unet") == (ScaledLora(BOTH, 0.5), ScaledLora(UNET, 0.7))
    assert narrowed(loras, "text_encoder") == (ScaledLora(BOTH, 0.2),)
    assert narrowed(loras, "text_encoder_2") == ()


def test_another_scale_of_the_encoders_leaves_the_unet_as_it_is() -> None:
    sets = [(ScaledLora(BOTH, 0.5, text_scale),) for text_scale in (None, 0.5, 0.1)]
    assert len({narrowed(loras, "unet") for loras in sets}) == 1
    assert len({narrowed(loras, "text_encoder") for loras in sets}) == 2


def test_the_order_counts() -> None:
    one, other = ScaledLora(BOTH, 0.5), ScaledLora(UNET, 0.5)
    assert narrowed((one, other), "unet") != narrowed((other, one), "unet")
