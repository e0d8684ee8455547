"""The application: every API on one desk."""

__all__ = ["create_app"]

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from sdxl_trt.runtime import open_bundle
from sdxl_trt.server.desk import Desk
from sdxl_trt.server.options import Options


def create_app(options: Options) -> FastAPI:
    """Return the ASGI application; the bundle is opened when it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with open_bundle(options.engines, provider=options.provider, residency=options.residency) as pipeline:
            app.state.desk = Desk(pipeline, options)
            yield
            app.state.desk.close()

    return FastAPI(title="sdxl-trt", lifespan=lifespan)
