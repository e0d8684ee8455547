"""The routes for pictures, for what the server has, and the websocket."""

__all__ = ["FileRoutes"]

import asyncio
import io
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image, ImageOps
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket

from sdxl_trt.server.comfyui.files import Stored, digest
from sdxl_trt.server.comfyui.menus import Names, folders, names_of, object_info, system_stats
from sdxl_trt.server.comfyui.names import FileKey, upload_key, wanted_key
from sdxl_trt.server.comfyui.shop import Shop
from sdxl_trt.server.comfyui.sockets import features
from sdxl_trt.server.http import ApiError, read_form, read_picture

Route = Callable[..., Any]
PLAIN_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_MEDIA = "image/png"
_LONGEST_PART = 1000


class FileRoutes:
    """The endpoints that queue nothing."""

    def __init__(self, shop: Shop) -> None:
        self._shop, self._files, self._options = shop, shop.files, shop.options

    def routes(self) -> list[tuple[str, str, Route]]:
        """Return method, path and endpoint of each route."""
        return [
            ("GET", "/view", self.view), ("POST", "/upload/image", self.upload),
            ("POST", "/upload/mask", self.upload_mask), ("GET", "/object_info", self.info),
            ("GET", "/object_info/{kind}", self.info_of), ("GET", "/system_stats", self.stats),
            ("GET", "/features", self.features), ("GET", "/embeddings", self.embeddings),
            ("GET", "/extensions", self.extensions), ("GET", "/models", self.models),
            ("GET", "/models/{folder}", self.models_of), ("POST", "/free", self.free),
        ]  # fmt: skip

    async def view(self, request: HttpRequest) -> Response:
        """Return one of the client's pictures."""
        query = request.query_params
        key = wanted_key(query.get("filename", ""), query.get("type") or "output", query.get("subfolder") or "")
        stored = self._files.find(request.state.caller.who, key)
        if stored is None:
            raise ApiError(404, "there is no such picture, or it is gone", "not_found", param="filename")
        data, media = await asyncio.to_thread(_shown, stored, query)
        headers = {"Content-Disposition": f'filename="{stored.key.name}"', "X-Content-Type-Options": "nosniff"}
        return Response(data, media_type=media, headers=headers)

    async def upload(self, request: HttpRequest) -> Response:
        """Keep a picture for the client's graphs, decoded and encoded again."""
        texts: dict[str, str] = {}
        picture: tuple[str, bytes] | None = None
        for part in await read_form(request):
            if part.name == "image" and part.filename is not None:
                if picture is not None:
                    raise ApiError(400, "image: several were given; send one", "invalid_value", param="image")
                picture = part.filename, part.data
            else:
                texts[part.name] = part.data[:_LONGEST_PART].decode(errors="replace")
        if picture is None:
            raise ApiError(400, "image: is missing; send the file as the part image", "invalid_value", param="image")
        if texts.get("type", "input") != "input":
            raise ApiError(400, "type: only input is taken", "invalid_value", param="type")
        key = upload_key(picture[0], texts.get("subfolder", ""))
        stored = await self._kept(request.state.caller.who, key, picture[1],
                                  overwrite=texts.get("overwrite", "").lower() in ("true", "1"))  # fmt: skip
        return JSONResponse({"name": stored.key.name, "subfolder": stored.key.subfolder, "type": stored.key.kind})

    async def _kept(self, who: str, key: FileKey, data: bytes, *, overwrite: bool) -> Stored:
        sha256 = digest(data)
        encoded = await asyncio.to_thread(self._encoded, data)
        path = await asyncio.to_thread(self._files.written, encoded)
        # Nothing is awaited from here on: the name that is found free is still free when it is taken.
        named = self._files.same_upload(who, key, sha256, overwrite=overwrite)
        if isinstance(named, Stored):
            path.unlink()
            return named
        return self._files.upload(who, named, path, sha256)

    def _encoded(self, data: bytes) -> bytes:
        """Return an untrusted picture as a PNG of the same pixels, upright, with nothing else in it."""
        picture = ImageOps.exif_transpose(read_picture(data, self._options, "image"))
        if picture.mode not in PLAIN_MODES:
            picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
        buffer = io.BytesIO()
        kept = {"transparency": picture.info["transparency"]} if "transparency" in picture.info else {}
        picture.info = {}
        picture.save(buffer, "PNG", **kept)
        return buffer.getvalue()

    async def upload_mask(self) -> Response:
        """Say that masks are not taken."""
        raise ApiError(404, "masks are not taken; upload a picture whose transparency is the mask", "not_found")

    async def info(self, request: HttpRequest) -> Response:
        """Return all classes of nodes."""
        return JSONResponse(object_info(await self._names(request)))

    async def info_of(self, request: HttpRequest, kind: str) -> Response:
        """Return one class of nodes."""
        return JSONResponse(object_info(await self._names(request), kind))

    async def stats(self, request: HttpRequest) -> Response:
        """Return what is known of the machine."""
        pool = request.app.state.desk.pipeline.pool
        return JSONResponse(system_stats(pool.provider, self._options.vram))

    async def features(self) -> Response:
        """Return what this server can do."""
        return JSONResponse(features(self._options.max_body))

    async def embeddings(self, request: HttpRequest) -> Response:
        """Return the names of the embeddings."""
        return JSONResponse([*(await self._names(request)).embeddings])

    async def extensions(self) -> Response:
        """Return the editor's extensions: there is no editor."""
        return JSONResponse([])

    async def models(self, request: HttpRequest) -> Response:
        """Return the folders of models."""
        return JSONResponse([*folders(await self._names(request))])

    async def models_of(self, request: HttpRequest, folder: str) -> Response:
        """Return the models of a folder."""
        found = folders(await self._names(request)).get(folder)
        if found is None:
            raise ApiError(404, "there is no such folder of models", "not_found", param="folder")
        return JSONResponse([*found])

    async def free(self) -> Response:
        """Do nothing: what is loaded is the server's own matter."""
        return Response()

    async def websocket(self, websocket: WebSocket) -> None:
        """Tell a client of its jobs."""
        await self._shop.sockets.serve(websocket, websocket.query_params.get("clientId", ""))

    async def _names(self, request: HttpRequest) -> Names:
        manifest = request.app.state.desk.pipeline.manifest
        uploads = self._files.uploads(request.state.caller.who)
        return await asyncio.to_thread(names_of, manifest, self._options, uploads)


def _shown(stored: Stored, query: Mapping[str, str]) -> tuple[bytes, str]:
    """Return a picture's file, or what a client wants made of it, with its type."""
    preview, channel = query.get("preview"), query.get("channel", "rgba")
    if channel not in ("rgba", "rgb", "a"):
        raise ApiError(400, "channel: choose one of rgba, rgb, a", "invalid_value", param="channel")
    if not preview and channel == "rgba":
        return stored.path.read_bytes(), _MEDIA
    with Image.open(stored.path, formats=["PNG"]) as image:
        if preview:
            return _small(image, preview)
        rgba = image.convert("RGBA")
    buffer = io.BytesIO()
    (rgba.convert("RGB") if channel == "rgb" else rgba.getchannel("A")).save(buffer, "PNG")
    return buffer.getvalue(), _MEDIA


def _small(image: Image.Image, wanted: str) -> tuple[bytes, str]:
    kind, _, quality = wanted.partition(";")
    kind = kind if kind in ("webp", "jpeg") else "webp"
    number = int(quality) if quality.isascii() and quality.isdigit() and len(quality) <= 3 else 90
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, kind.upper(), quality=min(max(number, 1), 100))
    return buffer.getvalue(), f"image/{kind}"
