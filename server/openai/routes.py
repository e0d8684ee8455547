"""The routes of OpenAI's API of images."""

__all__ = ["router"]

import asyncio
import functools
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any
from uuid import uuid4

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from sdxl_trt.engines import SdxlTrtError, UsageError
from sdxl_trt.runtime import Request
from sdxl_trt.runtime.adapters import find_named
from sdxl_trt.runtime.request import resolve_request
from sdxl_trt.server.desk import Desk, Order
from sdxl_trt.server.http import ApiError, read_form, read_json, read_picture
from sdxl_trt.server.openai.answers import Usage, answer, model, models
from sdxl_trt.server.openai.body import Asked, NamedLora, Start, invalid, read_asked, sorted_parts, translate
from sdxl_trt.server.openai.faults import as_api_error, check_ended, without_paths
from sdxl_trt.server.openai.models import ModelNames
from sdxl_trt.server.openai.pictures import start_from
from sdxl_trt.server.openai.stream import Streamed, answered, stream
from sdxl_trt.server.openai.tokens import TokenCounter
from sdxl_trt.server.options import Options
from sdxl_trt.server.readers import Asking, Once, Reader, deadline_of, ended_or_left

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""No proxy may store the events, or hold them back until there are many."""
_TOKENS = TokenCounter()
RETIRED = "variations are retired; send the picture to /v1/images/edits"


def router(options: Options) -> APIRouter:
    """Return the routes of /v1; the desk is the application's `state.desk`."""
    made, images = APIRouter(), _Images(options)
    made.post("/v1/images/generations")(images.generate)
    made.post("/v1/images/edits")(images.edit)
    made.post("/v1/images/variations")(images.variations)
    made.get("/v1/models")(images.list_models)
    made.get("/v1/models/{name:path}")(images.get_model)
    made.get("/v1/files/{name}")(images.get_file)
    return made


class _Images:
    """The endpoints, and what they share."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._created = int(time.time())
        self._once = Once(options)

    async def generate(self, request: HttpRequest) -> Response:
        """Draw pictures from a prompt."""
        body = await read_json(request)
        asked = read_asked(body, lenient=self._options.lenient)
        return await self._draw(request, asked, None, _asking(request, body))

    async def edit(self, request: HttpRequest) -> Response:
        """Draw a picture anew, all of it or where a mask is transparent."""
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise ApiError(415, "send a multipart/form-data body with the part image", "unsupported_media")
        form = sorted_parts(await read_form(request))
        asked = read_asked(form.fields, edit=True, form=True, lenient=self._options.lenient)
        request.state.caller.warnings += form.warnings
        self._names(request).check(asked.model)
        start = await asyncio.to_thread(self._start, form.pictures, form.masks)
        asking = _asking(request, form.fields, [*form.pictures, *form.masks])
        return await self._draw(request, asked, start, asking)

    async def variations(self, request: HttpRequest) -> Response:  # noqa: ARG002 - what it asks for is not read
        """Say that there are none."""
        raise ApiError(404, RETIRED, "not_found")

    async def list_models(self, request: HttpRequest) -> Response:
        """Return the bundle under all its names."""
        return JSONResponse(models(self._names(request).listed(), self._created))

    async def get_model(self, request: HttpRequest, name: str) -> Response:
        """Return the bundle under one of its names."""
        return JSONResponse(model(self._names(request).check(name), self._created))

    async def get_file(self, request: HttpRequest, name: str) -> Response:
        """Return a picture whose URL an answer gave."""
        token, _, extension = name.partition(".")
        stored = _desk(request).files.get(token)
        if stored is None or stored.media_type != f"image/{extension}":
            raise ApiError(404, "there is no such file, or it is gone: files are kept for an hour", "not_found")
        return Response(stored.data, media_type=stored.media_type, headers={"X-Content-Type-Options": "nosniff"})

    def _names(self, request: HttpRequest) -> ModelNames:
        """Return the names of the bundle that draws now: another one may be loaded."""
        return ModelNames.of(self._options, _desk(request).pipeline.pool.bundle.root)

    def _start(self, pictures: Sequence[bytes], masks: Sequence[bytes]) -> Start:
        if len(pictures) != 1:
            raise invalid("image", f"{len(pictures)} pictures were given; give one as the part image", "invalid_image")
        if len(masks) > 1:
            raise invalid("mask", f"{len(masks)} masks were given; give one at most", "invalid_image")
        picture = read_picture(pictures[0], self._options, "image")
        return start_from(picture, read_picture(masks[0], self._options, "mask") if masks else None)

    async def _draw(self, request: HttpRequest, asked: Asked, start: Start | None, asking: Asking) -> Response:
        self._names(request).check(asked.model)
        desk, caller = _desk(request), request.state.caller
        pipeline = desk.pipeline
        with nullcontext() if asking.may_repeat else desk.place(caller.who):
            translated = await asyncio.to_thread(
                translate, asked, self._options, pipeline.manifest, pipeline.pool.limits, self._find, start
            )
            try:
                usage, steps, notes = await asyncio.to_thread(self._prepared, desk, asked, translated.request)
                order = self._order(request, asked, translated.request)
                reader = await self._once.read(asking, lambda: desk.submit(order))
            except SdxlTrtError as exc:
                raise as_api_error(exc, self._options) from exc
        caller.warnings += (*translated.warnings, *notes)
        again = {"Idempotent-Replayed": "true"} if reader.replayed else {}
        if not asked.stream:
            return await self._answer(request, asked, reader, usage, again)
        kind = "image_generation" if start is None else "image_edit"
        streamed = Streamed(asked, kind, steps, usage, tuple(caller.warnings), pipeline.manifest,
                            functools.partial(self._link, request, asked), self._options)  # fmt: skip
        return StreamingResponse(stream(request, reader, streamed), media_type="text/event-stream",
                                 headers=STREAM_HEADERS | again)  # fmt: skip

    def _order(self, request: HttpRequest, asked: Asked, work: Request) -> Order:
        return Order(work, "openai", request.state.caller.who, f"img-{uuid4().hex}",
                     deadline_of(request.headers, self._options),
                     wants_estimates=asked.stream and asked.partial_images > 0)  # fmt: skip

    def _prepared(self, desk: Desk, asked: Asked, work: Request) -> tuple[Usage, int, list[str]]:
        """Return the tokens of a request, the steps of each of its pictures, and what in it has no effect."""
        pool = desk.pipeline.pool
        usage = _TOKENS.count(pool.bundle, asked.prompt, asked.negative)
        resolved = resolve_request(work, desk.pipeline.manifest, pool.limits, pool.bundle)
        steps = resolved.base.steps + (resolved.refiner.steps if resolved.refiner else 0)
        return usage, steps, [without_paths(note, self._options) for note in resolved.notes]

    async def _answer(
        self, request: HttpRequest, asked: Asked, reader: Reader, usage: Usage, headers: dict[str, str]
    ) -> Response:
        caller = request.state.caller
        ended, drawn = await ended_or_left(request, reader)
        check_ended(ended, self._options, drawn=len(drawn))
        if ended.outcome == "interrupted":
            caller.warnings.append("the request was interrupted: these are the pictures so far")
        pictures = await asyncio.to_thread(lambda: [answered(each, asked) for each in drawn])
        link = functools.partial(self._link, request, asked)
        return JSONResponse(answer(asked, pictures, reader.created, usage, caller.warnings, link), headers=headers)

    def _link(self, request: HttpRequest, asked: Asked, file: bytes) -> str:
        """Keep a picture's file for an hour; return its URL on the host that the client asked."""
        form = asked.output.format
        token = _desk(request).files.put(file, f"image/{form}", request.state.caller.who)
        return f"{str(request.base_url).rstrip('/')}/v1/files/{token}.{form}"

    def _find(self, lora: NamedLora) -> str:
        """Return the path of the LoRA of a name: only what lies in the server's folder is found."""
        folder = self._options.lora_dir
        if folder is None:
            raise invalid("loras", "this server has no LoRAs; it is started with --lora-dir DIR to have some")
        try:
            found = find_named(folder, lora.name, "loras")
        except UsageError:
            found = []
        if len(found) != 1:
            what = "there is no LoRA of one of these names" if not found else "several LoRAs have one of these names"
            raise invalid("loras", f"{what}; give names as the server's folder has them, with sub-folders")
        return str(found[0])


def _asking(request: HttpRequest, body: Mapping[str, Any], files: Sequence[bytes] = ()) -> Asking:
    return Asking.of(request.state.caller.who, request.url.path, request.headers, body, files)


def _desk(request: HttpRequest) -> Desk:
    desk: Desk = request.app.state.desk
    return desk
