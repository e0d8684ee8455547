"""A child's memory is measured by kind, without its parent's."""

import subprocess
import sys
from pathlib import Path

import msgspec

from sdxl_trt.benchmarks.measure.processes import Measured, machine, measure

MB = 1 << 20
# A child that signals when it holds its memory, and waits until it has been sampled.
HOLD = """
import mmap, os
{allocate}
open({ready!r}, "w").close()
while not os.path.exists({seen!r}):
    pass
"""
MEASURE = """
import os, sys
import msgspec
from sdxl_trt.benchmarks.measure import processes
code, ready, seen, held = sys.argv[1:]
block = bytearray(b"1") * int(held)
sample = processes._sample
def spy(pid, peaks):
    holds = os.path.exists(ready)
    sample(pid, peaks)
    if holds:
        open(seen, "w").close()
processes._sample = spy
sys.stdout.write(msgspec.json.encode(processes.measure([sys.executable, "-c", code])).decode())
"""


def _measured(allocate: str, folder: Path, held: int = 0) -> Measured:
    """Measure a child that allocates; the caller is a process that holds `held` bytes."""
    folder.mkdir()
    ready, seen = str(folder / "ready"), str(folder / "seen")
    code = HOLD.format(allocate=allocate, ready=ready, seen=seen)
    command = [sys.executable, "-c", MEASURE, code, ready, seen, str(held)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return msgspec.json.decode(done.stdout, type=Measured)


def test_anonymous_memory_and_mapped_files_are_distinguished(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(200 * MB))
    anonymous = _measured(f"block = bytearray(b'1') * {200 * MB}", tmp_path / "anonymous")
    opened = f"block = mmap.mmap(os.open({str(file)!r}, os.O_RDONLY), 0, prot=mmap.PROT_READ)"
    mapped = _measured(f"{opened}; sum(block[::4096])", tmp_path / "mapped")
    assert anonymous.ok
    assert mapped.ok
    assert 200 * MB < anonymous.peak_anonymous < 300 * MB
    assert anonymous.peak_file < 100 * MB
    assert mapped.peak_anonymous < 100 * MB
    assert mapped.peak_file > 200 * MB
    assert min(anonymous.peak_rss, mapped.peak_rss) > 200 * MB


def test_the_callers_memory_is_not_counted(tmp_path: Path) -> None:
    """Between fork and exec a child has the caller's pages, and the kernel's figure keeps them."""
    measured = _measured(f"block = bytearray(b'1') * {100 * MB}", tmp_path / "small", held=500 * MB)
    assert measured.ok
    assert 100 * MB < measured.peak_rss < 300 * MB


def test_a_failure_is_returned_with_its_output() -> None:
    measured = measure([sys.executable, "-c", "import sys; print('before'); sys.exit('planted')"])
    assert (measured.ok, measured.exit_code) == (False, 1)
    assert "planted" in measured.output
    assert measured.seconds > 0
    assert measured.peak_rss > 0


def test_a_killed_child_is_a_failure() -> None:
    measured = measure([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
    assert measured.exit_code == -9


def test_the_environment_is_extended() -> None:
    measured = measure([sys.executable, "-c", "import os; print(os.environ['PLANTED'], 'PATH' in os.environ)"], {"PLANTED": "1"})  # fmt: skip # noqa: E501
    assert measured.output == "1 True"


def test_the_machine_is_described() -> None:
    facts = machine()
    assert facts["memory_bytes"] > 1 << 28  # type: ignore[operator]
    assert facts["cores"] >= 1  # type: ignore[operator]
    assert str(facts["features"]).startswith("none of ") == (" avx2" not in Path("/proc/cpuinfo").read_text())
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
