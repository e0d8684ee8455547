"""The application: every API on one desk."""

__all__ = ["create_app"]

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from fastapi import FastAPI

from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.engines.host import __version__
from sdxl_trt.runtime import Pipeline, open_bundle
from sdxl_trt.server import a1111, comfyui, openai, ops, page
from sdxl_trt.server.desk import Desk
from sdxl_trt.server.http import Finished, Gate, add_handlers
from sdxl_trt.server.options import Options

APIS = (ops, openai, a1111, comfyui, page)
"""In the order in which their paths are tried."""


@contextmanager
def _opened(app: FastAPI, options: Options) -> Iterator[Pipeline]:
    """Open the bundle; an error is kept in `app.state.failure`, since uvicorn passes none on."""
    try:
        with open_bundle(options.engines, provider=options.provider, residency=options.residency,
                         available=options.vram) as pipeline:  # fmt: skip
            yield pipeline
    except SdxlTrtError as exc:
        app.state.failure = exc
        raise


def create_app(options: Options) -> FastAPI:
    """Return the ASGI application; the bundle is opened when it starts, and closed when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with _opened(app, options) as pipeline:
            app.state.desk = desk = Desk(pipeline, options)
            # A desk that tells of its units of work has them measured.
            getattr(desk, "on_unit", []).append(metrics.unit)
            yield
            desk.close()

    app = FastAPI(title="sdxl-trt", lifespan=lifespan, redoc_url=None, docs_url="/docs" if options.docs else None,
                  openapi_url="/openapi.json" if options.docs else None)  # fmt: skip
    sockets: Counter[str] = Counter()
    metrics = ops.Metrics(lambda: getattr(app.state, "desk", None), sockets.total, __version__)
    app.state.metrics = metrics

    def tell(finished: Finished) -> None:
        ops.log_request(finished)
        metrics.tell(finished)

    app.add_middleware(Gate, options=options, tell=tell, sockets=sockets)
    add_handlers(app, options)
    for api in APIS:
        if hasattr(api, "router"):
            app.include_router(api.router(options))
    return app
