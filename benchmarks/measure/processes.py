"""Run a command as a child process and measure its wall time and peak memory, mapped files apart."""

__all__ = ["Measured", "load_average", "machine", "measure"]

import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from sdxl_trt.engines import IncompatibleError
from sdxl_trt.engines.host import process_memory, total_memory

INTERVAL = 0.05
_TAIL = 600
FEATURES = ("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""The instructions that decide how fast a CPU multiplies in 8 bits and in bf16, as Linux names them."""


class Measured(msgspec.Struct, frozen=True):
    """One run of a command. Memory is in bytes.

    `peak_rss` is the kernel's figure: ``ru_maxrss``, or where that may be the caller's own memory, which a child
    inherits until it runs its program, the last sample of its high-water mark, ``VmHWM``. `peak_anonymous` and
    `peak_file` are the largest values sampled from ``/proc``, possibly at different times: anonymous memory must fit
    the machine, pages of mapped files can be dropped.
    """

    command: tuple[str, ...]
    exit_code: int
    seconds: float
    peak_rss: int
    peak_anonymous: int
    peak_file: int
    output: str

    @property
    def ok(self) -> bool:
        """Whether the command succeeded."""
        return self.exit_code == 0


def measure(command: list[str], environment: dict[str, str] | None = None) -> Measured:
    """Run `command` to its end and return the measurement; a failure is in `exit_code` and the tail of `output`.

    Raises IncompatibleError on Windows, which does not report the same figures.
    """
    peaks = {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
    settings = os.environ | (environment or {})
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        child = subprocess.Popen(  # noqa: S603 - our own commands
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=settings
        )
        own = process_memory().get("VmHWM", 0)
        try:
            status, usage = _wait(child.pid, peaks)
        except BaseException:
            child.kill()
            child.wait()
            raise
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace").strip()
    return Measured(
        command=tuple(command),
        exit_code=child.returncode,
        seconds=seconds,
        peak_rss=_peak_rss(usage.ru_maxrss << 10, own, peaks["VmHWM"]),
        peak_anonymous=peaks["RssAnon"],
        peak_file=peaks["RssFile"],
        output=text[-_TAIL:],
    )


def machine() -> dict[str, str | int]:
    """Return the machine's facts for a report, by name."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "features": _features(),
        "memory_bytes": _memory(),
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
    }


def load_average() -> float:
    """Return the machine's load over the last minute; NaN on Windows, which has none."""
    if sys.platform == "win32":
        return math.nan
    else:  # noqa: RET505 - the type checker reads the branches of a platform
        return os.getloadavg()[0]


def _processor() -> str:
    if sys.platform == "win32":
        return platform.processor()
    else:  # noqa: RET505
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _features() -> str:
    """Return those of FEATURES that the processor has."""
    if sys.platform == "win32":
        return "unknown"
    else:  # noqa: RET505
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
        return " ".join(feature for feature in FEATURES if feature in flags) or f"none of {' '.join(FEATURES)}"


def _memory() -> int:
    if sys.platform == "win32":
        return total_memory()
    else:  # noqa: RET505
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _wait(pid: int, peaks: dict[str, int]) -> "tuple[int, os._rusage]":  # type: ignore[name-defined]
    if sys.platform == "win32":
        raise IncompatibleError("peak memory is measured on Linux; run the measurement there, or in WSL2")
    else:  # noqa: RET506
        pause = INTERVAL / 32  # a short command is sampled too
        while True:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                return status, usage
            _sample(pid, peaks)
            time.sleep(pause)
            pause = min(2 * pause, INTERVAL)


def _peak_rss(reported: int, own: int, sampled: int) -> int:
    """Return the child's peak: what is reported counts the pages shared with the caller between fork and exec."""
    return sampled if sampled and reported <= own else reported


def _sample(pid: int, peaks: dict[str, int]) -> None:
    figures = process_memory(pid)  # empty if it has just ended
    for kind, peak in peaks.items():
        peaks[kind] = max(peak, figures.get(kind, 0))
