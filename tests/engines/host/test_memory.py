"""Amounts of memory are parsed and formatted; of the host's limits, the smaller counts."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.engines.host import memory
from sdxl_trt.engines.host.memory import available_host_memory, format_bytes, parse_bytes, process_memory

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that replaces /proc and /sys."""
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12GB", 12 * 10**9),
        ("12GiB", 12 << 30),
        ("12 gib", 12 << 30),
        ("12G", 12 * 10**9),
        ("1.5GB", 15 * 10**8),
        ("800MB", 8 * 10**8),
        ("512MiB", 512 << 20),
        ("64kB", 64_000),
        ("2TB", 2 * 10**12),
        (" 1000 ", 1000),
        ("7B", 7),
        ("0", 0),
    ],
)
def test_an_amount_is_parsed(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "12 apples", "1e9", "12GBs", "1.GB", ".5GB", "nan", "١٢GB", "12GB 3"]
)
def test_an_invalid_amount_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"size .* write it as 12GB, 12GiB or 800MB"):
        parse_bytes(text)


@given(st.integers(0, 10**15))
def test_a_bare_number_is_bytes(amount: int) -> None:
    assert parse_bytes(str(amount)) == amount


@given(st.integers(10**6, 10**12))
def test_a_formatted_amount_can_be_parsed(amount: int) -> None:
    assert parse_bytes(format_bytes(amount)) == pytest.approx(amount, rel=0.5 if amount < 10**7 else 0.05)


@pytest.mark.parametrize(
    ("amount", "text"), [(0, "0 kB"), (1500, "2 kB"), (303_000_000, "303 MB"), (12_900_000_000, "12.90 GB")]
)
def test_an_amount_is_printed_in_powers_of_a_thousand(amount: int, text: str) -> None:
    assert format_bytes(amount) == text


MEMINFO = "MemTotal:       65536 kB\nMemFree:  1 kB\nMemAvailable:    4096 kB\nHugePages_Total:       0\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"meminfo": MEMINFO}, 4 << 20),
        ({"meminfo": "MemTotal: 65536 kB\n"}, None),
        ({"memory.max": "max\n", "memory.current": "5\n"}, None),
        ({"meminfo": MEMINFO, "memory.max": "max\n", "memory.current": "5\n"}, 4 << 20),
        ({"meminfo": MEMINFO, "memory.max": "3000\n", "memory.current": "1000\n"}, 2000),
        ({"meminfo": MEMINFO, "memory.max": f"{GIB}\n", "memory.current": "0\n"}, 4 << 20),
        ({"meminfo": MEMINFO, "memory.max": "1000\n", "memory.current": "3000\n"}, 0),
        ({"memory.max": "1000\n"}, None),
    ],
)
def test_the_smaller_limit_counts(machine: Path, files: dict[str, str], expected: int | None) -> None:
    for name, text in files.items():
        (machine / name).write_text(text)
    assert available_host_memory() == expected


def test_this_machine_has_some_memory() -> None:
    available = available_host_memory()
    assert available is None or available > 0


def test_a_process_has_memory_and_one_that_has_ended_none() -> None:
    assert process_memory()["VmHWM"] >= process_memory(os.getpid())["RssAnon"] > 1 << 20
    assert process_memory(1 << 30) == {}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc keeps freed memory")
def test_freed_memory_returns_to_the_system() -> None:
    script = (
        "from sdxl_trt.engines.host import process_memory, return_freed_memory\n"
        "blocks = [bytearray(100_000) for _ in range(400)]\n"  # below the size that glibc maps by itself
        "last = bytearray(100_000)\n"  # the heap can only shrink at its end
        "before = process_memory()['RssAnon']\n"
        "del blocks\n"
        "kept = process_memory()['RssAnon']\n"
        "return_freed_memory()\n"
        "print(before, kept, process_memory()['RssAnon'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, kept, after = map(int, done.stdout.split())
    if platform.libc_ver()[0] == "glibc":
        assert before - kept < 10_000_000  # what the test is about: without the call it stays
        assert before - after > 30_000_000
