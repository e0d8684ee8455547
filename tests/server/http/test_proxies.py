"""Who calls behind a proxy: only a trusted one is believed, and only what it has seen itself."""

from ipaddress import ip_network

import pytest

from sdxl_trt.server.http.proxies import from_proxy

TRUSTED = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["1.2.3.4, 203.0.113.9"], "203.0.113.9"),  # the first was invented by the client
        ("10.0.0.1", ["1.2.3.4, 203.0.113.9, 10.0.0.7"], "203.0.113.9"),  # through two proxies
        ("10.0.0.1", ["1.2.3.4", "203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["203.0.113.9:4711"], "203.0.113.9"),
        ("10.0.0.1", ["[2001:db8::1]:80"], "2001:db8::1"),
        ("10.0.0.1", ["2001:db8::1"], "2001:db8::1"),
        ("::ffff:10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("fd00::1", ["::ffff:203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["10.0.0.7"], "10.0.0.7"),
        ("10.0.0.1", ["203.0.113.9, MARKERWORD"], "10.0.0.1"),
        ("10.0.0.1", ["unknown"], "10.0.0.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("203.0.113.5", ["1.2.3.4"], "203.0.113.5"),
    ],
)
def test_the_client_is_the_last_address_that_is_no_trusted_proxy(peer: str, forwarded: list[str], client: str) -> None:
    scope = {"type": "http", "client": (peer, 1), "scheme": "http",
             "headers": [(b"x-forwarded-for", each.encode()) for each in forwarded]}  # fmt: skip
    from_proxy(scope, TRUSTED)
    assert scope["client"][0] == client


@pytest.mark.parametrize(("kind", "scheme"), [("http", "https"), ("websocket", "wss")])
def test_the_scheme_is_that_which_a_trusted_proxy_was_asked_with(kind: str, scheme: str) -> None:
    headers = [(b"x-forwarded-proto", b"https")]
    plain = "http" if kind == "http" else "ws"
    for peer, expected in (("10.0.0.1", scheme), ("203.0.113.5", plain)):
        scope = {"type": kind, "client": (peer, 1), "scheme": plain, "headers": headers}
        from_proxy(scope, TRUSTED)
        assert scope["scheme"] == expected


def test_without_trusted_proxies_no_header_is_read() -> None:
    scope = {"type": "http", "client": ("127.0.0.1", 1), "scheme": "http",
             "headers": [(b"x-forwarded-for", b"1.2.3.4"), (b"x-forwarded-proto", b"https")]}  # fmt: skip
    from_proxy(scope, ())
    assert (scope["client"], scope["scheme"]) == (("127.0.0.1", 1), "http")
