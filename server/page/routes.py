"""The routes of the page: its files, from a table made at the start, and what it may offer."""

__all__ = ["FILES", "router"]

import asyncio
import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sdxl_trt.server.desk import Desk
from sdxl_trt.server.http import ApiError
from sdxl_trt.server.options import Options
from sdxl_trt.server.page.facts import facts, steps_of

FOLDER = Path(__file__).parent / "static"
_SCRIPT = "text/javascript; charset=utf-8"
FILES = {
    "index.html": "text/html; charset=utf-8", "style.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml",
} | dict.fromkeys(
    ("api.js", "app.js", "dom.js", "form.js", "gallery.js", "jobs.js", "record.js", "stage.js", "store.js"), _SCRIPT
)  # fmt: skip
"""The page's files and their media types: there are no others."""
_READ = ["GET", "HEAD"]
_CACHE = "no-cache"
"""Kept by the browser, and asked for anew: a new version shows at once, and an old one costs one short answer."""


@dataclass(frozen=True)
class _File:
    """A file as it is sent, whole and packed."""

    data: bytes
    packed: bytes
    media: str
    tag: str

    @classmethod
    def read(cls, name: str) -> "_File":
        data = (FOLDER / name).read_bytes()
        return cls(data, gzip.compress(data, mtime=0), FILES[name], hashlib.sha256(data).hexdigest()[:16])

    async def answer(self, request: Request) -> Response:
        """Return the file, packed for those who can unpack it; 304 if the browser has it."""
        packs = "gzip" in request.headers.get("accept-encoding", "")
        tag = f'"{self.tag}-gzip"' if packs else f'"{self.tag}"'
        headers = {"ETag": tag, "Cache-Control": _CACHE, "Vary": "Accept-Encoding"}
        known = {each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")}
        if tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        if packs:
            headers["Content-Encoding"] = "gzip"
        return Response(self.packed if packs else self.data, media_type=self.media, headers=headers)


def router(options: Options) -> APIRouter:
    """Return the routes of the page, which answer GET and HEAD; its files are read now."""
    made = APIRouter(include_in_schema=False)
    page = _Page(options)
    made.add_api_route("/", _File.read("index.html").answer, methods=_READ)
    made.add_api_route("/favicon.ico", _no_icon, methods=_READ)
    for name in FILES:
        if name != "index.html":
            made.add_api_route(f"/page/{name}", _File.read(name).answer, methods=_READ)
    made.add_api_route("/page/facts", page.facts, methods=_READ)
    made.add_api_route("/page/steps", page.steps, methods=_READ)
    return made


async def _no_icon() -> Response:
    """Say that the page's icon has another name."""
    return Response(status_code=204)


class _Page:
    """What the page asks for before it draws."""

    def __init__(self, options: Options) -> None:
        self._options = options

    async def facts(self, request: Request) -> Response:
        """Return what the page may offer."""
        desk = self._desk(request)
        found = await asyncio.to_thread(facts, desk.pipeline.manifest, desk.pipeline.pool.limits, self._options)
        return JSONResponse(found, headers={"Cache-Control": "no-store"})

    async def steps(self, request: Request) -> Response:
        """Return how many steps each expert takes at each handoff."""
        desk = self._desk(request)
        found = await asyncio.to_thread(
            steps_of, request.query_params, desk.pipeline.manifest, desk.pipeline.pool.limits, self._options
        )
        return JSONResponse(found, headers={"Cache-Control": "no-store"})

    def _desk(self, request: Request) -> Desk:
        """Return the desk. Raises ApiError (401) without a key, unless pictures are drawn without one as well.

        The page's files need no key, so that the page can ask for it; the names of LoRAs and models do.
        """
        options = self._options
        if options.keys and "openai" not in options.open_apis and not request.state.caller.who.startswith("key:"):
            raise ApiError(401, "an API key is missing or wrong; send Authorization: Bearer KEY", "invalid_api_key",
                           headers={"WWW-Authenticate": 'Bearer realm="trt-serve"'})  # fmt: skip
        desk: Desk = request.app.state.desk
        return desk
