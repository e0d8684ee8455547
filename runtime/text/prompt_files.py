"""A file of prompts, one a line."""

__all__ = ["read_prompts"]

from pathlib import Path

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.host import read_capped

MAX_BYTES = 16 << 20
MOST = 1_000
"""What is read of each waits in memory for its turn: 2 MB with SDXL's encoders."""


def read_prompts(path: Path, most: int | None = None) -> list[str]:
    """Return the prompts of a UTF-8 file, - for standard input: its lines, without empty ones and those after a #.

    At most `most` of them, MOST by default. Raises UsageError for a file that holds none, too many or no text.
    """
    most = MOST if most is None else most
    content = read_capped(path, MAX_BYTES, "--prompts")
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as exc:
        raise UsageError(f"--prompts {path}: is not UTF-8 at byte {exc.start}; save it as plain text in UTF-8") from exc
    prompts = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
    if not 1 <= len(prompts) <= most:
        raise UsageError(f"--prompts {path}: holds {len(prompts)} prompts; give one a line, and at most {most}")
    return prompts
