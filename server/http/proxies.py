"""Which address a request comes from, where a proxy that is trusted stands between."""

__all__ = ["from_proxy"]

import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import Scope

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def from_proxy(scope: Scope, trusted: Collection[Network]) -> None:
    """Give `scope` the client and the scheme that a trusted proxy states, if one sent the request.

    Of X-Forwarded-For, the last address that is no trusted proxy is the client: all before it may be invented.
    """
    client = scope.get("client")
    peer = _address(client[0]) if client else None
    if peer is None or not _is_trusted(peer, trusted):
        return
    headers = Headers(scope=scope)
    for text in reversed(",".join(headers.getlist("x-forwarded-for")).split(",")):
        address = _address(text)
        if address is None:
            break
        peer = address
        if not _is_trusted(address, trusted):
            break
    scope["client"] = (str(peer), 0)
    scheme = headers.get("x-forwarded-proto", "").strip().lower()
    if scheme in ("http", "https"):
        scope["scheme"] = scheme if scope["type"] == "http" else {"http": "ws", "https": "wss"}[scheme]


def _is_trusted(address: Address, trusted: Collection[Network]) -> bool:
    return any(address.version == each.version and address in each for each in trusted)


def _address(text: str) -> Address | None:
    """Return the address of text such as 10.0.0.1, 10.0.0.1:80, ::1 or [::1]:80; None if it has none."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
