"""``ranges.json`` of an 8-bit component: the measured ranges, which its quantizers' scales were made of."""

__all__ = ["read_ranges", "write_ranges"]

from pathlib import Path

import msgspec

from sdxl_trt.engines import CorruptError, explain_os_error
from sdxl_trt.export.eight_bit.ranges import Ranges

_MOST_BYTES = 16 << 20


class _Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    spans: dict[str, tuple[float, float]]
    version: int = 1


def write_ranges(ranges: Ranges, path: Path) -> None:
    """Write the ranges of a component to a new file. Raises ResourceError for a full disk."""
    try:
        path.write_bytes(msgspec.json.encode(_Content(ranges.spans)))
    except OSError as exc:
        raise explain_os_error(exc, f"writing {path}") from exc


def read_ranges(path: Path, component: str) -> Ranges:
    """Return the ranges of a component. Raises CorruptError for a file that `write_ranges` did not write."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise CorruptError(f"{path}: larger than {_MOST_BYTES >> 20} MiB, so no ranges; export again")
        content = msgspec.json.decode(path.read_bytes(), type=_Content)
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
    except msgspec.DecodeError as exc:
        raise CorruptError(f"{path}: holds no ranges ({exc}); export again") from exc
    found = Ranges(component)
    for name, (low, high) in content.spans.items():
        found.include(name, low, high)
    return found
