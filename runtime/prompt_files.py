"""A file of prompts, one a line."""

__all__ = ["read_prompts"]

from pathlib import Path

from sdxl_trt.engines.errors import UsageError, explain_os_error

MAX_BYTES = 16 << 20
MOST = 1_000
"""What is read of each waits in memory for its turn: 2 MB with SDXL's encoders."""


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a UTF-8 file: its lines, without those that are empty or start with #.

    Raises UsageError for a file that holds none, too many or no text.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as exc:
        raise explain_os_error(exc, f"--prompts {path}") from exc
    if len(content) > MAX_BYTES:
        raise UsageError(f"--prompts {path}: larger than {MAX_BYTES >> 20} MiB; split it")
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as exc:
        raise UsageError(f"--prompts {path}: is not UTF-8 at byte {exc.start}; save it as plain text in UTF-8") from exc
    prompts = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
    if not 1 <= len(prompts) <= MOST:
        raise UsageError(f"--prompts {path}: holds {len(prompts)} prompts; give one a line, and at most {MOST}")
    return prompts
