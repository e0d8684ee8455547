"""Building blocks of the manifest's records: a frozen, keyword-only struct, and types for numbers and digests."""

__all__ = ["FileRecord", "Natural", "Positive", "Record", "Sha256"]

from typing import Annotated

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Frozen, keyword-only; unknown fields are ignored, so manifests of later minor versions stay readable."""


class FileRecord(Record, frozen=True, kw_only=True):
    """A file of the bundle: `file` is relative to the bundle, with forward slashes."""

    file: str
    size: Natural
    sha256: Sha256
