"""The JSON configs of a model source, read as untrusted input."""

__all__ = ["PUBLISHED", "read_json"]

import json
from pathlib import Path
from typing import Any

from sdxl_trt.engines import CorruptError, SourceError, explain_os_error

PUBLISHED = Path(__file__).with_name("published")
"""SDXL's own configs and tokenizers, `base/` and `refiner/`, which a single-file checkpoint lacks."""
MAX_JSON_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file; raise SourceError if the file is missing, CorruptError if it is broken."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CorruptError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB, so not a config; download it again")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as exc:
        raise SourceError(f"{path}: missing; download the whole model folder") from exc
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
    except (ValueError, RecursionError) as exc:
        raise CorruptError(f"{path}: broken JSON ({exc}); download it again") from exc
    if not isinstance(value, dict):
        raise CorruptError(f"{path}: expected a JSON object, found {type(value).__name__}; download it again")
    return value
