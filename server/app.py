"""The application: every API on one desk."""

__all__ = ["create_app", "open_engines"]

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.runtime import Pipeline, open_bundle
from sdxl_trt.server import a1111, comfyui, openai, ops, page
from sdxl_trt.server.desk import Desk
from sdxl_trt.server.http import Gate, add_handlers
from sdxl_trt.server.options import Options

APIS = (ops, openai, a1111, comfyui, page)
"""In the order in which their paths are tried."""


def open_engines(options: Options) -> Pipeline:
    """Return the pipeline of the bundle that `options` name; only its manifest is read. Raises SdxlTrtError.

    A link is followed now: its pipeline reads the same folder even if the link changes.
    """
    engines = None if options.engines is None else options.engines.resolve()
    return open_bundle(engines, provider=options.provider, residency=options.residency, available=options.vram,
                       compute_precision=options.compute_precision)  # fmt: skip


def own_desk(pipeline: Pipeline, options: Options) -> Desk:
    """Return a desk that closes `pipeline` with itself."""
    return Desk(pipeline, options, owned=True)


def create_app(
    options: Options,
    opener: Callable[[Options], Pipeline] = open_engines,
    make_desk: Callable[[Pipeline, Options], Desk] = own_desk,
) -> FastAPI:
    """Return the ASGI application; the bundle is opened when it starts, and closed when it ends.

    An error by which it does not start is kept in `app.state.failure`: a server of ASGI passes none on. Raises
    UsageError for traces whose packages are missing.
    """
    operations = ops.Operations(options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            pipeline = opener(options)
        except SdxlTrtError as exc:
            app.state.failure = exc
            raise
        desk = app.state.desk = make_desk(pipeline, options)
        app.state.reloader = ops.Reloader(desk, lambda: opener(options), options)
        operations.follow(desk)
        try:
            yield
        finally:
            desk.close()
            operations.close()

    app = FastAPI(title="sdxl-trt", lifespan=lifespan, redoc_url=None, docs_url="/docs" if options.docs else None,
                  openapi_url="/openapi.json" if options.docs else None)  # fmt: skip
    app.state.metrics = operations.metrics
    app.add_middleware(Gate, options=options, tell=operations.tell, sockets=operations.sockets,
                       allowance=operations.allowance)  # fmt: skip
    app.add_middleware(operations.traced)
    add_handlers(app, options)
    for api in APIS:
        if hasattr(api, "router"):
            app.include_router(api.router(options))
    return app
