"""What of a bundle is told to operators: enough to tell it from another one, and nothing of where it lies."""

__all__ = ["digest_of"]

import hashlib

import msgspec

from sdxl_trt.engines.bundle import Manifest

DIGITS = 12


def digest_of(manifest: Manifest) -> str:
    """Return the first digits of the SHA-256 of a manifest, which holds the digests of all files of its bundle."""
    return hashlib.sha256(msgspec.json.encode(manifest)).hexdigest()[:DIGITS]
