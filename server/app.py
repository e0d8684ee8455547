"""The application: every API on one desk."""

__all__ = ["create_app", "open_engines"]

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
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


def open_engines(options: Options) -> Pipeline:
    """Return the pipeline of the bundle that `options` name; only its manifest is read. Raises SdxlTrtError."""
    return open_bundle(options.engines, provider=options.provider, residency=options.residency, available=options.vram)


@contextmanager
def _opened(app: FastAPI, options: Options, opener: Callable[[Options], Pipeline]) -> Iterator[Pipeline]:
    """Open the bundle; an error is kept in `app.state.failure`, since uvicorn passes none on."""
    try:
        with opener(options) as pipeline:
            yield pipeline
    except SdxlTrtError as exc:
        app.state.failure = exc
        raise


def create_app(
    options: Options,
    opener: Callable[[Options], Pipeline] = open_engines,
    make_desk: Callable[[Pipeline, Options], Desk] = Desk,
) -> FastAPI:
    """Return the ASGI application; the bundle is opened when it starts, and closed when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with _opened(app, options, opener) as pipeline:
            app.state.desk = desk = make_desk(pipeline, options)
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
