"""The application of Ray Serve: an ingress with our APIs, and one or two pools."""

__all__ = ["BASE", "INGRESS", "REFINER", "application", "built"]

import logging
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.exceptions import BackPressureError

from sdxl_trt.engines import UsageError
from sdxl_trt.runtime import Pipeline
from sdxl_trt.server.options import Options, read_keys
from sdxl_trt.server.ray.cluster import Cluster, planned
from sdxl_trt.server.ray.desk import RayDesk, open_ingress
from sdxl_trt.server.ray.errands import Errand
from sdxl_trt.server.ray.layout import Layout
from sdxl_trt.server.ray.options import Deployed, ingress_options, pool_options
from sdxl_trt.server.ray.outlet import Outlet, Send
from sdxl_trt.server.ray.pool import Pool, PoolName
from sdxl_trt.server.ray.room import Pools

INGRESS, BASE, REFINER = "Ingress", "Base", "Refiner"


class _Device:
    """A replica of a pool."""

    async def __init__(self, name: PoolName, options: Options) -> None:  # type: ignore[misc]  # Serve awaits it
        from sdxl_trt.server.app import open_engines  # noqa: PLC0415 - a replica needs them, the ingress not
        from sdxl_trt.server.comfyui import run_graph  # noqa: PLC0415

        _log_to_stderr()
        self._pool = Pool(name, options, open_engines, run_graph)
        await self._pool.start()

    async def draw(self, errand: Errand) -> AsyncIterator[Any]:
        """Do an errand; see `Pool.draw`."""
        async for event in self._pool.draw(errand):
            yield event

    async def ready(self) -> bool:
        """Return that it can draw: it is asked only when it was made."""
        return True

    def check_health(self) -> None:
        """Raise if Ray should replace this replica."""
        self._pool.check()

    def __del__(self) -> None:
        if hasattr(self, "_pool"):
            self._pool.close()


def built(layout: Layout, deployed: Deployed) -> serve.Application:
    """Return the application that draws with `layout`."""
    options, batch = deployed.options, deployed.batch
    parts: list[tuple[str, PoolName, int]] = [(BASE, "base", layout.base), (REFINER, "refiner", layout.refiner)]
    if not layout.split:
        parts = [(BASE, "both", layout.together)]
    device = serve.deployment(_Device)
    pools = [device.options(name=name, **pool_options(deployed, devices)).bind(kind, options)
             for name, kind, devices in parts]  # fmt: skip

    def build() -> FastAPI:
        return _ingress(options, layout, batch)

    # The pools are bound so that they are deployed with the ingress; it finds them by their names.
    entrance = serve.deployment(serve.ingress(build)()).options(name=INGRESS, **ingress_options(deployed))
    return entrance.bind(*pools)


def application(stated: Mapping[str, Any]) -> serve.Application:
    """Return the application for a config file of Ray Serve, whose `args` are `stated`.

    They are fields of `Options` by their names, `api_key_file`, and for the cluster `layout`, `devices` and `seconds`.
    Raises UsageError.
    """
    for_cluster = {name: stated[name] for name in ("layout", "devices", "seconds") if name in stated}
    rest = {name: value for name, value in stated.items() if name not in for_cluster}
    options = _options(rest)
    layout, deployed = planned(options, Cluster(**for_cluster))
    logging.getLogger("sdxl_trt.server").warning("%s", layout.line())
    return built(layout, deployed)


def _options(stated: dict[str, Any]) -> Options:
    import msgspec  # noqa: PLC0415

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
        raise NotImplementedError
    return Path(value)


def _ingress(options: Options, layout: Layout, batch: int) -> FastAPI:
    """Return the ASGI application of the ingress, whose desk sends what it takes to the pools."""
    from sdxl_trt.server.app import create_app  # noqa: PLC0415 - only the ingress serves HTTP

    _log_to_stderr()
    name = serve.get_replica_context().app_name

    def make_desk(pipeline: Pipeline, options: Options) -> RayDesk:
        return RayDesk(pipeline, options, layout, lambda: _pools(name, layout, batch))

    return create_app(options, open_ingress, make_desk)


def _pools(app_name: str, layout: Layout, batch: int) -> Pools:
    base = serve.get_deployment_handle(BASE, app_name)
    refiner = serve.get_deployment_handle(REFINER, app_name) if layout.split else None

    async def ready() -> None:
        for handle in (base, refiner):
            if handle is not None:
                await handle.ready.remote()

    outlets = [Outlet(_sender(handle), 2 * batch * devices, BackPressureError)
               for handle, devices in ((base, layout.base + layout.together), (refiner, layout.refiner))
               if handle is not None]  # fmt: skip
    return Pools(outlets[0], outlets[1] if refiner is not None else None, ready)


def _sender(handle: Any) -> Send:
    send: Callable[[Errand], Any] = handle.options(stream=True).draw.remote
    return send


def _log_to_stderr() -> None:
    """Write the lines of the server to the replica's stderr, which Ray keeps."""
    logger = logging.getLogger("sdxl_trt.server")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
