"""The application that a config file of Ray Serve names, such as KubeRay's."""

__all__ = ["application", "options_of_args"]

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

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
    unknown = stated.keys() - {each.name for each in fields(Options)}
    if unknown:
        raise UsageError(f"args: {min(unknown)!r} is no option; the names are those of trt-serve's options")
    try:
        made: Options = msgspec.convert({"keys": keys, **stated}, Options, dec_hook=_as_path)
    except msgspec.ValidationError as exc:
        raise UsageError(f"args: {exc}; the values are those of trt-serve's options") from exc
    return made


def _as_path(kind: type, value: object) -> Path:
    if kind is not Path or not isinstance(value, str):
        raise TypeError(f"{value!r} is not a path")
    return Path(value)
