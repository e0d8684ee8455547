"""API keys: what a request brings, and whether it is one of ours."""

__all__ = ["given_keys", "key_id", "matching_key"]

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable, Mapping


def key_id(key: str) -> str:
    """Return the name of a key for logs and the queue: "key:" and eight digits of its SHA-256."""
    return f"key:{_digest(key).hex()[:8]}"


def given_keys(headers: Mapping[str, str]) -> list[str]:
    """Return the keys that a request brings: Bearer, the password of Basic, x-api-key or api-key."""
    keys = [headers[name] for name in ("x-api-key", "api-key") if headers.get(name)]
    scheme, _, value = headers.get("authorization", "").partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer" and value:
        keys.append(value)
    elif scheme.lower() == "basic":
        keys += _password(value)
    return keys


def _password(value: str) -> list[str]:
    try:
        text = base64.b64decode(value, validate=True).decode()
    except (binascii.Error, ValueError):
        return []
    password = text.partition(":")[2]
    return [password] if password else []


def matching_key(given: Iterable[str], keys: Iterable[str]) -> str | None:
    """Return the first of `keys` that was given, or None. Every pair is compared, in a time that tells nothing."""
    offered, found = [_digest(each) for each in given], None
    for key in keys:
        digest = _digest(key)
        for each in offered:
            if hmac.compare_digest(digest, each):
                found = found or key
    return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
