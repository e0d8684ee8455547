"""The option --lora: a file or a bare name, and two scales."""

import pytest

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.adapters.use import LoraUse, parse_use


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("ink", LoraUse("ink")),
        ("ink:0.8", LoraUse("ink", 0.8)),
        ("style/ink:-1:0.5", LoraUse("style/ink", -1.0, 0.5)),
        ("a.safetensors", LoraUse("a.safetensors")),
        ("C:\\loras\\a.SAFETENSORS:1:0", LoraUse("C:\\loras\\a.SAFETENSORS", 1.0, 0.0)),
        ("12:30.safetensors:2", LoraUse("12:30.safetensors", 2.0)),
        ("a.pt:0.5", LoraUse("a.pt", 0.5)),
    ],
)
def test_a_file_or_a_name_with_its_scales_is_read(text: str, use: LoraUse) -> None:
    assert parse_use(text) == use


@pytest.mark.parametrize("text", ["", ":1", "ink:", "ink:much", "ink:1:2:3", "ink:nan", "ink:1:inf"])
def test_anything_else_is_one_line(text: str) -> None:
    with pytest.raises(UsageError, match="give FILE, FILE:SCALE or FILE:SCALE:TE_SCALE"):
        parse_use(text)
