"""The option --lora, and its scales in records and messages."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sdxl_trt.engines.adapters.file import Lora
from sdxl_trt.engines.adapters.kinds import Branch
from sdxl_trt.engines.adapters.names import COMPONENTS, LoraComponent, Place
from sdxl_trt.engines.adapters.option import LoraOption, parse_lora_option
from sdxl_trt.engines.adapters.scaled import ScaledLora
from sdxl_trt.engines.bundle.manifest import LoraRecord
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.export.components import Options


@pytest.mark.parametrize(
    ("text", "path", "scales"),
    [
        ("a.safetensors", "a.safetensors", (1.0, None)),
        ("a.safetensors:0.8", "a.safetensors", (0.8, None)),
        ("a.safetensors:0.8:0.5", "a.safetensors", (0.8, 0.5)),
        ("a.safetensors:0:-1", "a.safetensors", (0.0, -1.0)),
        ("dir/a:b.safetensors:-1.5", "dir/a:b.safetensors", (-1.5, None)),
        ("dir:2:3/a.safetensors", "dir:2:3/a.safetensors", (1.0, None)),
        (r"C:\loras\a.SafeTensors", r"C:\loras\a.SafeTensors", (1.0, None)),
        (r"C:\loras\a.safetensors:1e-1:2", r"C:\loras\a.safetensors", (0.1, 2.0)),
        ("a.safetensors:0.5.safetensors", "a.safetensors:0.5.safetensors", (1.0, None)),
    ],
)
def test_lora_options_are_parsed(text: str, path: str, scales: tuple[float, float | None]) -> None:
    assert parse_lora_option(text) == LoraOption(Path(path), *scales)


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(st.text("ab:./ 1", max_size=12), FINITE, FINITE)
@example(":", -0.0, 1.0)
def test_lora_options_survive_a_round_trip(stem: str, scale: float, text_scale: float) -> None:
    path = f"{stem}.safetensors"
    assert parse_lora_option(f"{path}:{scale!r}:{text_scale!r}") == LoraOption(Path(path), scale, text_scale)
    assert parse_lora_option(f"{path}:{scale!r}") == LoraOption(Path(path), scale)
    assert parse_lora_option(path) == LoraOption(Path(path))


@pytest.mark.parametrize(
    "text", ["", "a", "a.pt", "a:0.5", ":", "a.safetensors:", "a.safetensors:x", "a.safetensors:nan",
             "a.safetensors:inf", "a.safetensors:0.5:", "a.safetensors::0.5", "a.safetensors:1:inf",
             "a.safetensors:1:2:3", "a.safetensors 0.5"]
)  # fmt: skip
def test_malformed_lora_options_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--lora"):
        parse_lora_option(text)


def test_options_accept_pairs_and_triples() -> None:
    path = Path("a.safetensors")
    options = Options(loras=((path, 0.8), (path, 0.8, 0.5), LoraOption(path)))
    assert options.loras == (LoraOption(path, 0.8), LoraOption(path, 0.8, 0.5), LoraOption(path, 1.0))


def _lora(*components: LoraComponent) -> Lora:
    branches = {name: (Branch(Place(name, "a", ""), "difference", {}),) for name in components}
    return Lora(Path("a.safetensors"), "0" * 64, branches, ("a.safetensors: left out",))


def test_each_component_has_its_scale() -> None:
    lora = _lora(*COMPONENTS)
    assert [ScaledLora(lora, 0.8, 0.5).on(name) for name in COMPONENTS] == [0.8, 0.5, 0.5]
    assert [ScaledLora(lora, 0.8).on(name) for name in COMPONENTS] == [0.8] * 3
    assert [ScaledLora(lora, 0.8, 0.0).on(name) for name in COMPONENTS] == [0.8, 0.0, 0.0]


@pytest.mark.parametrize(("text_scale", "kept", "told"), [
    (None, None, "0.8"), (0.8, None, "0.8"), (0.5, 0.5, "0.8 (0.5 on the text encoders)"),
    (0.0, 0.0, "0.8 (0 on the text encoders)"),
])  # fmt: skip
def test_a_record_has_a_second_scale_only_if_it_differs(
    text_scale: float | None, kept: float | None, told: str
) -> None:
    record = LoraRecord.of("a.safetensors", "0" * 64, 0.8, text_scale)
    assert record == LoraRecord(name="a.safetensors", sha256="0" * 64, scale=0.8, text_scale=kept)
    assert record.told == told


@pytest.mark.parametrize(
    ("components", "scales", "expected"),
    [
        (("unet",), (0.8, 0.5), ["nothing for the text encoders, so their scale 0.5 has no effect"]),
        (("text_encoder_2",), (0.8, 0.5), ["nothing for the UNet, so its scale 0.8 has no effect"]),
        (("unet", "text_encoder"), (0.8, 0.5), []),
        (("unet",), (0.8, 0.8), []),
        (("unet",), (0.8,), []),
    ],
)
def test_a_scale_without_effect_is_noted(
    components: tuple[LoraComponent, ...], scales: tuple[float, ...], expected: list[str]
) -> None:
    left_out, *rest = ScaledLora(_lora(*components), *scales).notes()
    assert left_out == "a.safetensors: left out"
    assert [line.partition("has ")[2] for line in rest] == expected
