"""Health: whether the process lives, and whether it takes work."""

__all__ = ["metrics_app", "router"]

from fastapi import APIRouter
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from sdxl_trt.server.desk import Desk
from sdxl_trt.server.ops.metrics import Metrics
from sdxl_trt.server.ops.reloading import reload_router
from sdxl_trt.server.options import Options

_LIVE = ("/health/live", "/healthz", "/v2/health/live")
_READY = ("/health/ready", "/health", "/v2/health/ready")


def router(options: Options) -> APIRouter:
    """Return the routes of health, metrics and reloads."""
    routes = APIRouter(include_in_schema=False)
    for path in _LIVE:
        routes.add_api_route(path, _live)
    for path in _READY:
        routes.add_api_route(path, _ready)
    if options.metrics_port is None:
        routes.add_api_route("/metrics", _metrics)
    routes.include_router(reload_router(options))
    return routes


def metrics_app(metrics: Metrics) -> ASGIApp:
    """Return the application of --metrics-port: /metrics, which needs no key there, and nothing else."""
    app = Starlette(routes=[Route("/metrics", _metrics)])
    app.state.metrics = metrics
    return app


async def _live() -> Response:
    return JSONResponse({"live": True})


async def _ready(request: Request) -> Response:
    desk: Desk = request.app.state.desk
    if state := desk.ready:
        return JSONResponse({"ready": True})
    return JSONResponse({"ready": False, "reason": state.reason}, 503, {"Retry-After": "5"})


async def _metrics(request: Request) -> Response:
    text, media = request.app.state.metrics.text()
    return Response(text, media_type=media)
