"""Paths of any bytes: in shell commands, in records, and on outputs of any encoding."""

import io
import itertools
import json
import ntpath
import os
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.errors import SourceError, UsageError
from sdxl_trt.engines.host.console import print_json
from sdxl_trt.engines.host.paths import (
    OUTPUT_ERRORS,
    is_utf8,
    known_as,
    one_line,
    refused_by_windows,
    require_utf8,
    shell_word,
)
from sdxl_trt.engines.plans.files import rebuild_command

NAMES = [b"plain", b"two words", b"two  blanks", b"it's", b'"$HOME"', b"~", b"caf\xc3\xa9", b"caf\xe9 \xff",
         b"a\nb\x1b[31m", b"back\\slash \xfe", b"\xed\xb3\xa9", b"-o"]  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="no shell")
@pytest.mark.parametrize("name", NAMES)
def test_a_shell_reads_exactly_the_bytes(name: bytes) -> None:
    word = shell_word(Path(os.fsdecode(name)))
    line = one_line(f"next: printf %s {word}").removeprefix("next: ")
    assert line.endswith(word), "a message must not change it"
    assert subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout == name


def test_suggested_commands_are_quoted(tmp_path: Path) -> None:
    root = tmp_path / "my bundle"
    with pytest.raises(SourceError, match=f"--out '{root}'$"):
        read_bundle(root)
    from sdxl_trt.mini.embedded import bundle_path

    bundle = read_bundle(bundle_path())
    moved = type(bundle)(root, bundle.manifest)
    assert rebuild_command(moved, "tensorrt") == f"export-engines --engine tensorrt --out '{root}'"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_an_output_accepts_every_path(encoding: str) -> None:
    file = io.BytesIO()
    stream = io.TextIOWrapper(file, encoding, errors=OUTPUT_ERRORS, newline="\n")
    for name in NAMES:
        stream.write(os.fsdecode(name) + "\n")
    stream.write("\ud800\n")
    stream.flush()
    if encoding == "utf-8":
        assert file.getvalue() == b"".join(name + b"\n" for name in NAMES) + b"\\ud800\n"
    assert b"caf\xe9 \xff\n" in file.getvalue()


def test_json_restores_the_path(capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        print_json({"path": os.fsdecode(name)})
        assert os.fsencode(json.loads(capsys.readouterr().out)["path"]) == name


def test_a_record_and_a_message_show_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    assert known_as(path) == "caf\\xe9.png"
    assert known_as(Path("\ud800")) == "?"
    assert known_as(tmp_path / "café.png") == "café.png"
    assert one_line(f"{path.name}: \x1b[31m\ud800 x") == "caf\\xe9.png: [31m x"
    assert not is_utf8(path)
    require_utf8(tmp_path, "TensorRT")
    with pytest.raises(UsageError, match="is not UTF-8, and TensorRT cannot open such a path; rename it"):
        require_utf8(path, "TensorRT")


DEVICES = [
    "CON",
    "prn",
    "Aux",
    "NUL",
    "COM1",
    "com9",
    "LPT5",
    "lpt²",
    "CONIN$",
    "conout$",
    "COM10",
    "NULL",
    "xCON",
    "CO",
]


@pytest.mark.parametrize(
    "name", ["".join(parts) for parts in itertools.product(DEVICES, ["", ".png", " .x", ".tar.gz", "x", "-1.png"])]
)
def test_devices_are_those_that_python_knows(name: str) -> None:
    known = getattr(ntpath, "isreserved", None) or (lambda text: PureWindowsPath(text).is_reserved())
    assert refused_by_windows(name) == known(name)


@pytest.mark.parametrize("character", '<>:"/\\|?*\0\x1f')
def test_a_character_that_windows_refuses_is_found(character: str) -> None:
    assert refused_by_windows(f"a{character}b")


@pytest.mark.parametrize(
    ("name", "refused"), [("a.", True), ("a ", True), (".a", False), ("a b.c", False), ("é×", False)]
)
def test_dots_and_spaces_count_at_the_end_alone(name: str, *, refused: bool) -> None:
    assert refused_by_windows(name) is refused
