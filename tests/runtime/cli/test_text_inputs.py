"""Files and standard input, read whole and capped."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.engines.host.text_inputs import read_capped
from sdxl_trt.runtime.cli.generate import main as trt_generate
from sdxl_trt.runtime.text.prompt_files import read_prompts


def _pipe(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "ascii"))


def test_a_file_and_standard_input_are_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"\x89PNG\r\n\x1a\n\xff\0 f\xc3\xbcchse"
    (tmp_path / "x").write_bytes(content)
    _pipe(monkeypatch, content)
    assert read_capped(tmp_path / "x", len(content), "--workflow") == content
    assert read_capped(Path("-"), len(content), "--workflow") == content
    _pipe(monkeypatch, "ein Fuchs\n# -\nrot 🦊".encode())
    assert read_prompts(Path("-")) == ["ein Fuchs", "rot 🦊"]


def test_a_file_called_dash_has_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("./-").write_bytes(b"x")
    assert read_capped(tmp_path / "-", 1, "--prompts") == b"x"


@pytest.mark.parametrize("stdin", [True, False])
def test_more_than_the_limit_is_refused_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, stdin: bool
) -> None:
    pipe = io.BytesIO(bytes(1000))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe, closed=False))
    (tmp_path / "x").write_bytes(bytes(1000))
    with pytest.raises(UsageError, match="is larger than 10 bytes"):
        read_capped(Path("-") if stdin else tmp_path / "x", 10, "--prompts")
    assert pipe.tell() == (11 if stdin else 0)


def test_what_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "none", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(UsageError, match=r"--workflow .*check the path"):
            read_capped(path, 10, "--workflow")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="there is no standard input"):
        read_capped(Path("-"), 10, "--workflow")


def test_standard_input_is_there_once(fails: Any) -> None:
    error = fails(trt_generate, ["--prompts", "-", "--workflow", "-"], 2)
    assert "--prompts - and --workflow - would both read standard input" in error
