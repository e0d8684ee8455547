"""Reloading: a bundle that was exported anew is served without an end of the server."""

__all__ = ["Reloader", "reload_router"]

import asyncio
import logging
import time
from collections.abc import Callable

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.runtime import Pipeline
from sdxl_trt.server.desk import Desk
from sdxl_trt.server.http import ApiError, without_folders
from sdxl_trt.server.ops.bundles import digest_of
from sdxl_trt.server.options import Options

log = logging.getLogger("sdxl_trt.server")


class Reloader:
    """Has a desk draw with what `open_pipeline` opens: the bundle as its folder holds it now."""

    def __init__(self, desk: Desk, open_pipeline: Callable[[], Pipeline], options: Options) -> None:
        self._desk, self._open, self._options = desk, open_pipeline, options
        self._busy = False

    async def reload(self) -> str:
        """Serve the bundle as it is now; return the first digits of its digest.

        Raises ApiError (409), with a reason in one line, if it cannot be opened or draws no picture: what was served
        before is then served on. So it does while another reload runs, and when the server is stopping.
        """
        if self._busy or self._desk.draining:
            what = "the server is stopping" if self._desk.draining else "the bundle is being loaded anew already"
            raise ApiError(409, f"{what}; the bundle was not loaded anew", "conflict")
        self._busy, began = True, time.monotonic()
        try:
            await self._desk.swap_pipeline(self._open)
        except Exception as exc:
            reason = self._reason(exc)
            log.warning("the bundle was not loaded anew, the one before is served on: %s", reason)
            raise ApiError(409, f"the one before is served on: {reason}", "reload_failed") from exc
        finally:
            self._busy = False
        digest = digest_of(self._desk.pipeline.manifest)
        log.info("the bundle was loaded anew in %.1f s: %s", time.monotonic() - began, digest)
        return digest

    async def on_signal(self) -> None:
        """Reload for a signal, which nobody waits for: what became of it is in the log."""
        try:
            await self.reload()
        except ApiError as exc:
            if exc.code != "reload_failed":
                log.warning("%s", exc.message)

    def _reason(self, exc: Exception) -> str:
        if isinstance(exc, SdxlTrtError):
            return without_folders(str(exc), self._options)
        return f"no picture could be drawn with it ({type(exc).__name__})"


def reload_router(options: Options) -> APIRouter:
    """Return the route of POST /admin/reload, which takes a key, and no web page's request but the server's own."""

    async def reload(request: Request) -> Response:
        if not options.keys:
            raise ApiError(403, "who asks for a reload needs a key; start the server with --api-key-file FILE, or send"
                                " it SIGHUP", "forbidden")  # fmt: skip
        if request.headers.get("origin") in options.cors_origins:
            raise ApiError(403, "a page of another origin may not ask for a reload", "forbidden")
        reloader: Reloader = request.app.state.reloader
        # Whoever leaves before the answer does not stop what has begun.
        digest = await asyncio.shield(asyncio.ensure_future(reloader.reload()))
        return JSONResponse({"reloaded": True, "bundle": digest})

    routes = APIRouter(include_in_schema=False)
    routes.add_api_route("/admin/reload", reload, methods=["POST"])
    return routes
