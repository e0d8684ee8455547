"""Names of pictures: the user's own are replaced, all others never, whoever takes them meanwhile."""

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.engines.host.files import atomic_write
from sdxl_trt.runtime.cli.file_names import MAX_STEM_BYTES, file_stem
from sdxl_trt.runtime.cli.outputs import Pictures, check_outputs
from sdxl_trt.runtime.images.picture import Picture

NOW = datetime(2026, 3, 9, 5, 7, 8, tzinfo=UTC)


def _runs(*counts: int, seed: int = 7) -> Any:
    return [
        SimpleNamespace(request=SimpleNamespace(seeds=list(range(seed, seed + count)), width=64, height=32))
        for count in counts
    ]


def _picture(colour: str = "red") -> Picture:
    return Picture(Image.new("RGB", (4, 4), colour), 7, {}, None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _there() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def _save_all(files: Pictures, runs: Any) -> list[str]:
    return [
        str(files.save(_picture(), number, index, metadata=False))
        for number, run in enumerate(runs)
        for index in range(len(run.request.seeds))
    ]


@pytest.mark.parametrize(
    ("counts", "sheet", "kind", "expected"),
    [
        ((1,), False, None, [["sdxl-7.png"], ["sdxl-7-1.png"], ["sdxl-7-2.png"]]),
        ((1,), False, "webp", [["sdxl-7.webp"], ["sdxl-7-1.webp"], ["sdxl-7-2.webp"]]),
        ((2,), False, None, [["sdxl-7-0.png", "sdxl-7-1.png"], ["sdxl-7-1-0.png", "sdxl-7-1-1.png"]]),
        ((1, 2), False, None, [[f"sdxl-7-{i}.png" for i in range(3)], [f"sdxl-7-1-{i}.png" for i in range(3)]]),
        ((1,), True, None, [["sdxl-7-0.png", "sdxl-7.png"], ["sdxl-7-1-0.png", "sdxl-7-1.png"]]),
    ],
)
def test_no_picture_is_replaced(counts: tuple[int, ...], kind: Any, expected: Any, *, sheet: bool) -> None:
    for names in expected:
        runs = _runs(*counts)
        files = Pictures(None, kind, runs, sheet=sheet)
        made = _save_all(files, runs)
        if sheet:
            made.append(str(files.save_sheet(Image.new("RGB", (4, 4)), {})))
        assert made == names
    assert _there() == sorted(name for names in expected for name in names)


def test_a_name_is_taken_where_the_whole_set_is_free() -> None:
    Path("sdxl-7-2.png").touch()
    assert _save_all(Pictures(None, None, _runs(2)), _runs(2)) == ["sdxl-7-0.png", "sdxl-7-1.png"]
    assert Pictures(None, None, _runs(3)).path(0, 0) == Path("sdxl-7-1-0.png")
    Path("sdxl-7.png").symlink_to("nowhere")
    assert Pictures(None, None, _runs(1)).out.name not in _there()
    Path("sdxl-8-preview.png").touch()
    assert Pictures(None, None, _runs(1, seed=8)).preview == Path("sdxl-8-1-preview.png")


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_two_runs_at_once_lose_no_picture(monkeypatch: pytest.MonkeyPatch, *, links: bool) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    first, second = Pictures(None, None, _runs(1)), Pictures(None, None, _runs(1))
    assert first.out == second.out
    assert first.save(_picture("red"), 0, 0, metadata=False) == Path("sdxl-7.png")
    assert second.save(_picture("blue"), 0, 0, metadata=False) == Path("sdxl-7-1.png")
    assert _there() == ["sdxl-7-1.png", "sdxl-7.png"], "no temporary files"
    with Image.open("sdxl-7.png") as kept:
        assert kept.getpixel((0, 0)) == (255, 0, 0)


def test_a_name_of_the_user_s_is_replaced() -> None:
    for colour in ("red", "blue"):
        out = Path("mine.png")
        assert Pictures(out, None, _runs(1)).save(_picture(colour), 0, 0, metadata=False) == out
    with Image.open("mine.png") as kept:
        assert kept.getpixel((0, 0)) == (0, 0, 255)
    assert _there() == ["mine.png"]


def test_a_file_that_is_there_stays_whatever_happens() -> None:
    Path("x").write_text("old")
    with pytest.raises(FileExistsError), atomic_write(Path("x"), replace=False) as file:
        file.write(b"new")
    assert (_there(), Path("x").read_text()) == (["x"], "old")


def test_a_workflow_s_prefix_is_the_name() -> None:
    for expected in ("ComfyUI.png", "ComfyUI-1.png"):
        runs = _runs(1)
        assert _save_all(Pictures(None, None, runs, prefix="out/ComfyUI"), runs) == [expected]
    assert Pictures(None, None, _runs(1), prefix="%KSampler.seed%").out == Path("sdxl-7.png")
    assert Pictures(Path("mine.png"), None, _runs(1), prefix="ComfyUI").out == Path("mine.png")


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("ComfyUI", "ComfyUI"), ("video/ComfyUI", "ComfyUI"), ("a\\b", "b"), ("Füchse 🦊", "Füchse 🦊"),
        ("%width%x%height%", "64x32"), ("%year%-%month%-%day%_%hour%%minute%%second%", "2026-03-09_050708"),
        ("%date:yyyy-MM-dd%", "2026-03-09"), ("%date:yy.M.d h:m:s%", "26.3.9 5_7_8"), ("%date:hhmmss%", "050708"),
        ("100%", "100_"), ("/etc/passwd", "passwd"), ("../../x", "x"), ("..", None), ("", None), ("out/", None),
        ("-rf", "rf"), (".hidden", "hidden"), ("a\0b\x1b[31m\n", "ab[31m"), ('a:b*c?"<>|', "a_b_c_____"),
        ("x" * 500, "x" * MAX_STEM_BYTES), ("ü" * 500, "ü" * (MAX_STEM_BYTES // 2)), ("\ud800x", "x"), ("%a.b%", None),
        ("NUL", "_NUL"), ("com1.final", "_com1.final"), ("NULL", "NULL"), ("con." + "x" * 200, "_con." + "x" * 115),
    ],
)  # fmt: skip
def test_a_prefix_is_filled_in_and_cleaned(prefix: str, expected: str | None) -> None:
    assert file_stem(prefix, 64, 32, NOW) == expected


def test_a_variable_of_the_page_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert file_stem("x_%KSampler.seed%", 1, 1, NOW) is None
    assert "%KSampler.seed% is known to ComfyUI's page alone" in caplog.text


@given(st.text(max_size=300))
def test_any_prefix_is_a_plain_file_name_or_none(prefix: str) -> None:
    stem = file_stem(prefix, 1, 1, NOW)
    if stem is not None:
        assert Path(stem).name == stem
        assert len(os.fsencode(stem)) <= MAX_STEM_BYTES
        assert stem.isprintable()
        assert stem[0] not in ".-"


@pytest.mark.parametrize("name", ["NUL.png", "aux.png", "a:b.png", "what?.png", "com7.x.png"])
def test_a_name_that_windows_refuses_is_refused_there_before_the_work(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = argparse.Namespace(out=Path(name), format=None, save_latents=None, sweep=None, prompts=None)
    check_outputs(arguments)
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UsageError, match="Windows does not allow this name; give one without"):
        check_outputs(arguments)
    arguments.out = Path("null-a_b.png")
    check_outputs(arguments)
