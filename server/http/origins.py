"""Which pages and which names of this server a browser may use: what keeps a strange web page out."""

__all__ = ["check_host", "check_origin", "cors_headers", "is_listed", "preflight"]

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response

from sdxl_trt.server.http.errors import ApiError
from sdxl_trt.server.options import Options

_SAFE = ("GET", "HEAD", "OPTIONS")
_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
EXPOSED = "X-Request-ID, X-TRT-Warnings, Retry-After, Idempotent-Replayed"


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _split(authority: str, scheme: str) -> tuple[str, int | None]:
    """Return the (host, port) of a Host header, or of an Origin without its scheme; ("", None) if it is none."""
    try:
        parts = urlsplit(f"//{authority}")
        port = parts.port
    except ValueError:
        return "", None
    if parts.path or parts.query or parts.fragment or parts.username is not None:
        return "", None
    return (parts.hostname or "").rstrip("."), port if port is not None else _PORTS.get(scheme)


def check_host(headers: Headers, options: Options) -> None:
    """Refuse (403) a Host that is not one of ours: a name that somebody points at this machine (DNS rebinding).

    Without --allowed-hosts, a server on a loopback address knows loopback names only, and others take any name.
    """
    host = _split(headers.get("host", ""), "http")[0]
    if options.allowed_hosts:
        known = host in {name.lower() for name in options.allowed_hosts}
    else:
        known = not _is_loopback(options.host) or _is_loopback(host)
    if not known:
        raise ApiError(403, "this server has another name; start it with --allowed-hosts to give it this one",
                       "forbidden")  # fmt: skip


def is_listed(headers: Headers, options: Options) -> bool:
    """Say whether the page that sent a request is one of --cors-origin."""
    return headers.get("origin", "") in options.cors_origins


def check_origin(scope: Mapping[str, object], headers: Headers, options: Options) -> None:
    """Refuse (403) what a web page of another origin sends, unless it is listed.

    A page may have a browser send JSON as plain text without asking first, so this is the only guard of every POST. On
    a loopback address, nothing of another origin is answered, nor is any websocket.
    """
    origin = headers.get("origin")
    if origin is None or is_listed(headers, options):
        return
    scheme, _, authority = origin.partition("://")
    mine = _split(headers.get("host", ""), scheme)
    safe = scope["type"] == "http" and scope["method"] in _SAFE and not _is_loopback(mine[0])
    if not safe and (_split(authority, scheme) != mine or not mine[0]):
        raise ApiError(403, "a page of another origin may not use this server; start it with --cors-origin to allow it",
                       "forbidden")  # fmt: skip


def preflight(scope: Mapping[str, object], headers: Headers, options: Options) -> Response | None:
    """Return the answer to a listed page's question what it may send; None if the request is no such question."""
    asks = scope["type"] == "http" and scope["method"] == "OPTIONS" and "access-control-request-method" in headers
    if not asks or not is_listed(headers, options):
        return None
    return Response(status_code=204, headers={
        "Access-Control-Allow-Methods": "GET, HEAD, POST",
        "Access-Control-Allow-Headers": "Authorization, Content-Type, Idempotency-Key, X-API-Key, X-Request-ID",
        "Access-Control-Max-Age": "600",
    })  # fmt: skip


def cors_headers(headers: Headers, options: Options) -> dict[str, str]:
    """Return the headers by which a browser shows an answer to a listed page; cookies are never used."""
    if not options.cors_origins:
        return {}
    if not is_listed(headers, options):
        return {"Vary": "Origin"}
    return {"Access-Control-Allow-Origin": headers["origin"], "Access-Control-Expose-Headers": EXPOSED,
            "Vary": "Origin"}  # fmt: skip
