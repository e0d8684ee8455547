"""Health: whether the process lives, and whether it takes work."""

__all__ = ["readiness", "router"]

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sdxl_trt.server.desk import Desk
from sdxl_trt.server.options import Options

_LIVE = ("/health/live", "/healthz", "/v2/health/live")
_READY = ("/health/ready", "/health", "/v2/health/ready")


def router(options: Options) -> APIRouter:
    """Return the routes of health and metrics."""
    routes = APIRouter(include_in_schema=False)
    for path in _LIVE:
        routes.add_api_route(path, _live)
    for path in _READY:
        routes.add_api_route(path, _ready)
    if options.metrics_port is None:
        routes.add_api_route("/metrics", _metrics)
    return routes


async def _live() -> Response:
    return JSONResponse({"live": True})


async def _ready(request: Request) -> Response:
    ready, reason = readiness(request.app.state.desk)
    if ready:
        return JSONResponse({"ready": True})
    return JSONResponse({"ready": False, "reason": reason}, 503, {"Retry-After": "5"})


def readiness(desk: Desk) -> tuple[bool, str]:
    """Return whether new work is taken, and the reason if it is not."""
    if desk.draining:
        return False, "the server is stopping"
    state = getattr(desk, "ready", None)
    if state is not None and not state:
        return False, str(getattr(state, "reason", "") or "no engine is ready")
    if desk.waiting() >= desk.options.queue:
        return False, "the queue is full"
    return True, ""


async def _metrics(request: Request) -> Response:
    text, media = request.app.state.metrics.text()
    return Response(text, media_type=media)
