"""The option --control, and the pictures that a record names."""

import hashlib
from pathlib import Path

import pytest

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.controls.controls import ControlFact, find_control
from sdxl_trt.runtime.controls.use import ControlUse, parse_control


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("pose.png", ControlUse("pose.png")),
        ("pose.png:0.8", ControlUse("pose.png", 0.8)),
        ("pose.png:-0.8:0.1:0.5", ControlUse("pose.png", -0.8, 0.1, 0.5)),
        ("depth=pose.png:0.8", ControlUse("pose.png", 0.8, net="depth")),
        ("canny-sdxl-1.0=a b/c.JPEG:1", ControlUse("a b/c.JPEG", net="canny-sdxl-1.0")),
        ("./a=b.png", ControlUse("./a=b.png")),
        ("C:\\pictures\\pose.png:0.5", ControlUse("C:\\pictures\\pose.png", 0.5)),
        ("picture:0.5", ControlUse("picture", 0.5)),
    ],
)
def test_the_option_is_read(text: str, use: ControlUse) -> None:
    assert parse_control(text) == use


@pytest.mark.parametrize("text", ["", "=pose.png:1:2:3:4", "pose.png:", "pose.png:x", "pose.png:1:0", "a.png:nan"])
def test_another_option_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"give \[NAME=\]FILE\[:SCALE\[:START:END\]\]"):
        parse_control(text)


def test_a_recorded_picture_is_found_beside_the_picture_if_it_is_unchanged(tmp_path: Path) -> None:
    (tmp_path / "pose.png").write_bytes(b"pixels")
    fact = ControlFact(name="pose.png", sha256=hashlib.sha256(b"pixels").hexdigest(), net="edges")
    assert find_control(fact, tmp_path / "fox.png") == tmp_path / "pose.png"
    (tmp_path / "pose.png").write_bytes(b"others")
    with pytest.raises(UsageError, match="which is not beside it as it was; give it with --control FILE"):
        find_control(fact, tmp_path / "fox.png")
