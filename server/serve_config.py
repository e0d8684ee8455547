"""The application that a config file of Ray Serve names, such as KubeRay's."""

__all__ = ["application", "options_of_args"]

import logging
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from sdxl_trt.engines import UsageError
from sdxl_trt.server.app import create_app, open_engines
from sdxl_trt.server.comfyui import run_graph
from sdxl_trt.server.options import Options, read_keys
from sdxl_trt.server.ray import Cluster, Parts, built, planned


def application(stated: Mapping[str, Any]) -> Any:
    """Return the `ray.serve.Application` of a config file, whose `args` are `stated`.

    They are fields of `Options` by their names, `api_key_file`, and for the cluster `layout`, `devices` and `seconds`.
    Raises UsageError.
    """
    for_cluster = {name: stated[name] for name in ("layout", "devices", "seconds") if name in stated}
    rest = {name: value for name, value in stated.items() if name not in for_cluster}
    options = options_of_args(rest)
    layout, deployed = planned(options, Cluster(**for_cluster))
    logging.getLogger("sdxl_trt.server").warning("%s", layout.line())
    return built(layout, deployed, Parts(create_app, open_engines, run_graph))


def options_of_args(stated: Mapping[str, Any]) -> Options:
    """Return the options that `args` state, `api_key_file` among them. Raises UsageError."""
    stated = dict(stated)
    keys = read_keys(Path(stated.pop("api_key_file"))) if "api_key_file" in stated else frozenset()
    kinds = get_type_hints(Options)
    unknown = stated.keys() - kinds.keys()
    if unknown:
        raise UsageError(f"args: {min(unknown)!r} is no option; the names are those of trt-serve's options")
    made: dict[str, Any] = {"keys": keys}
    for name, value in stated.items():
        # msgspec knows no union of networks.
        kind = tuple[_Network, ...] if name == "trusted_proxies" else kinds[name]
        try:
            made[name] = msgspec.convert(value, kind, dec_hook=_converted)
        except msgspec.ValidationError as exc:
            raise UsageError(f"args: {name}: {exc}; the values are those of trt-serve's options") from exc
    if "trusted_proxies" in made:
        made["trusted_proxies"] = tuple(each.network for each in made["trusted_proxies"])
    return Options(**made)


class _Network:
    """A network in text."""

    def __init__(self, text: str) -> None:
        self.network = ip_network(text, strict=False)


def _converted(kind: type, value: object) -> Any:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return kind(value)
