"""A file of prompts: what is a prompt in it, and what no such file is."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.text import prompt_files
from sdxl_trt.runtime.text.prompt_files import read_prompts


def test_lines_are_prompts_but_for_empty_ones_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red fox\r\n\n  # the blue ones\n\t\n a blue star, #3 \n红狐狸 🦊\x85still".encode())
    assert read_prompts(path) == ["a red fox", "a blue star, #3", "红狐狸 🦊\x85still"]


def test_what_is_no_file_of_prompts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prompts.txt"
    monkeypatch.setattr(prompt_files, "MOST", 3)
    for content, message in (
        (b"", "holds 0 prompts"), (b"# only\n", "holds 0 prompts"), (b"a\nb\nc\nd", "holds 4 prompts"),
        (b"ok\n\xff", "not UTF-8 at byte 3"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            read_prompts(path)
    monkeypatch.setattr(prompt_files, "MAX_BYTES", 4)
    path.write_text("a red fox")
    with pytest.raises(UsageError, match="larger than"):
        read_prompts(path)
    with pytest.raises(UsageError, match="check the path"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UsageError):
        read_prompts(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="replace")))
def test_any_file_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with contextlib.suppress(UsageError):
        for prompt in read_prompts(tmp_path / "x"):
            assert prompt == prompt.strip() != ""
            assert "\n" not in prompt
