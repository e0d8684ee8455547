"""The application of Ray Serve: an ingress with our APIs, and one or two pools."""

__all__ = ["BASE", "INGRESS", "REFINER", "OneId", "built"]

import logging
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

from sdxl_trt.runtime import Pipeline
from sdxl_trt.server.options import Options
from sdxl_trt.server.ray.desk import RayDesk, open_ingress
from sdxl_trt.server.ray.errands import Errand
from sdxl_trt.server.ray.layout import Layout
from sdxl_trt.server.ray.options import Deployed, Parts, ingress_options, pool_options
from sdxl_trt.server.ray.outlet import Outlet, Send
from sdxl_trt.server.ray.pool import Pool, PoolName
from sdxl_trt.server.ray.room import Pools

ID = b"x-request-id"
INGRESS, BASE, REFINER = "Ingress", "Base", "Refiner"


class _Device:
    """A replica of a pool."""

    async def __init__(self, name: PoolName, options: Options, parts: Parts) -> None:  # type: ignore[misc]  # awaited
        _log_to_stderr()
        self._pool = Pool(name, options, parts.open_engines, parts.run_graph)
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


def built(layout: Layout, deployed: Deployed, parts: Parts) -> Any:
    """Return the `ray.serve.Application` that draws with `layout`."""
    from ray import serve  # noqa: PLC0415 - the extra [ray]

    options, batch = deployed.options, deployed.batch
    kinds: list[tuple[str, PoolName, int]] = [(BASE, "base", layout.base), (REFINER, "refiner", layout.refiner)]
    if not layout.split:
        kinds = [(BASE, "both", layout.together)]
    device = serve.deployment(_Device)
    pools = [device.options(name=name, **pool_options(deployed, devices)).bind(kind, options, parts)
             for name, kind, devices in kinds]  # fmt: skip

    def build() -> Any:
        return _ingress(options, layout, batch, parts)

    # The pools are bound so that they are deployed with the ingress; it finds them by their names.
    entrance = serve.deployment(serve.ingress(build)()).options(name=INGRESS, **ingress_options(deployed))
    return entrance.bind(*pools)


def _ingress(options: Options, layout: Layout, batch: int, parts: Parts) -> Any:
    """Return the ASGI application of the ingress, whose desk sends what it takes to the pools."""
    from ray import serve  # noqa: PLC0415

    _log_to_stderr()
    name = serve.get_replica_context().app_name

    def make_desk(pipeline: Pipeline, options: Options) -> RayDesk:
        return RayDesk(pipeline, options, layout, lambda: _pools(name, layout, batch))

    app = parts.create_app(options, open_ingress, make_desk)
    app.add_middleware(OneId)
    return app


class OneId:
    """ASGI middleware: lets Serve's proxy alone send the request's id, which it has put into the request."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on."""
        known = any(name == ID for name, _ in scope.get("headers", ()))

        async def send_once(message: Any) -> None:
            if known and message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message.get("headers", ()) if pair[0].lower() != ID]
            await send(message)

        await self._app(scope, receive, send_once)


def _pools(app_name: str, layout: Layout, batch: int) -> Pools:
    from ray import serve  # noqa: PLC0415
    from ray.serve.exceptions import BackPressureError  # noqa: PLC0415

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
