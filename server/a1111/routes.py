"""The routes of A1111's API."""

__all__ = ["router"]

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.runtime import Picture
from sdxl_trt.runtime.images import describe
from sdxl_trt.runtime.request import resolve_request
from sdxl_trt.server.a1111.body import Asked, Models, echo, read_asked
from sdxl_trt.server.a1111.faults import as_api_error, check_ended, without_paths
from sdxl_trt.server.a1111.infotext import info, infotext
from sdxl_trt.server.a1111.jobs import Job, Jobs, Shown, progress_told, task_told
from sdxl_trt.server.a1111.menus import Menus
from sdxl_trt.server.a1111.pictures import encode, preview
from sdxl_trt.server.a1111.translation import Translated, Translator
from sdxl_trt.server.desk import Desk, Drawn, Ended, Order
from sdxl_trt.server.http import read_json
from sdxl_trt.server.options import Options
from sdxl_trt.server.readers import Asking, Once, Reader, deadline_of, gone

PARAMETERS = "parameters"
"""The text of a picture file that A1111 reads."""
MOST_TASK = 400


def router(options: Options) -> APIRouter:
    """Return the routes of /sdapi/v1 and /internal/progress; the desk is the application's `state.desk`."""
    made, menus = APIRouter(), Menus(options)
    drawing = _Drawing(options, menus)
    made.post("/sdapi/v1/txt2img")(drawing.txt2img)
    made.post("/sdapi/v1/img2img")(drawing.img2img)
    made.get("/sdapi/v1/progress")(drawing.progress)
    made.post("/sdapi/v1/interrupt")(drawing.interrupt)
    made.post("/sdapi/v1/skip")(drawing.skip)
    made.post("/internal/progress")(drawing.task)
    for method, path, route in menus.routes():
        made.add_api_route(f"/sdapi/v1/{path}", route, methods=[method])
    return made


class _Drawing:
    """The endpoints about pictures, and the jobs that they share."""

    def __init__(self, options: Options, menus: Menus) -> None:
        self._options, self._menus, self._jobs, self._once = options, menus, Jobs(), Once(options)

    async def txt2img(self, request: HttpRequest) -> Response:
        """Draw pictures from a prompt."""
        return await self._draw(request, img2img=False)

    async def img2img(self, request: HttpRequest) -> Response:
        """Change a picture, all of it or where a mask is white."""
        return await self._draw(request, img2img=True)

    # ---------------------------------------------------------------- drawing

    async def _draw(self, request: HttpRequest, *, img2img: bool) -> Response:
        body, desk, caller = await read_json(request), desk_of(request), request.state.caller
        started = datetime.now(UTC)
        models = Models.of(desk.pipeline.manifest)
        asked = read_asked(body, models, self._menus.settings, img2img=img2img)
        try:
            translated, notes = await asyncio.to_thread(self._translated, desk, asked)
            order = self._order(request, translated)
            reader = await self._once.read(_asking(request, body), lambda: desk.submit(order))
        except SdxlTrtError as exc:
            raise as_api_error(exc, self._options) from exc
        caller.warnings += (*translated.warnings, *notes)
        job = Job(reader.ticket, caller.who, asked.pictures, translated.steps, asked.id_task, started)
        ended, drawn = await self._awaited(request, reader, job)
        _note(caller.notes, asked, translated, ended)
        check_ended(ended, self._options)
        if ended.outcome == "interrupted":
            caller.warnings.append("the request was interrupted: these are the pictures so far")
        pictures, images = await asyncio.to_thread(_encoded, asked, models, translated, drawn)
        include = asked.start is not None and asked.start.include
        told = echo(body, img2img=img2img, include=include)
        facts = info(asked, models, pictures, started, unit=translated.unit)
        answer = {"images": images, "parameters": told, "info": facts}
        return JSONResponse(answer, headers={"Idempotent-Replayed": "true"} if reader.replayed else None)

    def _translated(self, desk: Desk, asked: Asked) -> tuple[Translated, list[str]]:
        """Return the Request, and what the runtime says of it: on a thread, since both read files."""
        pipeline = desk.pipeline
        translated = Translator(pipeline.manifest, pipeline.pool.limits, self._options).translate(asked)
        resolved = resolve_request(translated.request, pipeline.manifest, pipeline.pool.limits, pipeline.pool.bundle)
        return translated, [without_paths(note, self._options) for note in resolved.notes]

    def _order(self, request: HttpRequest, translated: Translated) -> Order:
        return Order(translated.request, "a1111", request.state.caller.who, f"sd-{uuid4().hex}",
                     deadline_of(request.headers, self._options), wants_estimates=True, keeps_estimates=False,
                     own_noise=True)  # fmt: skip

    async def _awaited(self, request: HttpRequest, reader: Reader, job: Job) -> tuple[Ended, list[Drawn]]:
        """Return how a job ended, and its pictures in order; if its client leaves before, so does its reader."""
        self._jobs.add(job)
        left = asyncio.create_task(gone(request))
        left.add_done_callback(lambda task: None if task.cancelled() else reader.leave())
        drawn = []
        try:
            async for event in job.ticket.events():
                job.saw(event)
                if isinstance(event, Drawn):
                    drawn.append(event)
            ended = await job.ticket.wait()
        except asyncio.CancelledError:
            reader.leave()
            raise
        finally:
            self._jobs.end(job)
            left.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await left
        return ended, sorted(drawn, key=lambda each: each.index)

    # ---------------------------------------------------------------- progress

    async def progress(self, request: HttpRequest) -> Response:
        """Say how far the caller's own job is: the one that is drawn, else the first that waits."""
        jobs = self._jobs.of(request.state.caller.who)
        skip = request.query_params.get("skip_current_image", "").lower() in ("true", "1", "on", "yes")
        job, shown = (jobs[0] if jobs else None), (None if skip else _shown(request))
        return JSONResponse(await asyncio.to_thread(progress_told, job, shown))

    async def task(self, request: HttpRequest) -> Response:
        """Say how far the caller's job with the id that it gave as `force_task_id` is."""
        body, who = await read_json(request), request.state.caller.who
        name, known = str(body.get("id_task") or "")[:MOST_TASK], body.get("id_live_preview")
        job = next((job for job in self._jobs.of(who) if name and job.id_task == name), None)
        shown = _shown(request) if body.get("live_preview", True) else None
        number = known if isinstance(known, int) and not isinstance(known, bool) else -1
        completed = self._jobs.is_finished(who, name)
        return JSONResponse(await asyncio.to_thread(task_told, job, completed=completed, shown=shown, known=number))

    async def interrupt(self, request: HttpRequest) -> Response:
        """Stop the caller's jobs that are drawn, or else those that wait; they answer with the pictures so far."""
        jobs = self._mine(request)
        for job in [job for job in jobs if job.begun] or jobs:
            job.ticket.interrupt()
        return JSONResponse({})

    async def skip(self, request: HttpRequest) -> Response:
        """Stop the caller's job that is drawn, if it has one picture: pictures of one job are drawn together."""
        jobs = [job for job in self._mine(request) if job.begun]
        for job in jobs:
            if job.pictures == 1:
                job.ticket.interrupt()
            else:
                request.state.caller.warnings.append("skip: has no effect on a job of several pictures; interrupt it")
        return JSONResponse({})

    def _mine(self, request: HttpRequest) -> list[Job]:
        if self._options.interrupt_all:
            return [*self._jobs.everyones()]
        return self._jobs.of(request.state.caller.who)


def desk_of(request: HttpRequest) -> Desk:
    """Return the application's desk."""
    desk: Desk = request.app.state.desk
    return desk


def _asking(request: HttpRequest, body: Mapping[str, Any]) -> Asking:
    return Asking.of(request.state.caller.who, request.url.path, request.headers, body)


def _shown(request: HttpRequest) -> Shown:
    manifest = desk_of(request).pipeline.manifest

    def show(estimate: NDArray[np.float32]) -> str:
        return preview(estimate, manifest)

    return show


def _finished(drawn: Drawn, translated: Translated) -> Picture:
    """Return a finished picture, with what is laid over it."""
    paste = translated.paste
    return drawn.picture if paste is None else replace(drawn.picture, image=paste.onto(drawn.picture.image))


def _encoded(
    asked: Asked, models: Models, translated: Translated, drawn: Sequence[Drawn]
) -> tuple[list[Picture], list[str]]:
    """Return the finished pictures, and their files: they hold A1111's text and the settings that draw them again."""
    kind, quality = asked.settings.kind, asked.settings.jpeg_quality
    pictures, images = [_finished(each, translated) for each in drawn], []
    for each in pictures if asked.send_images else ():
        texts = describe(each.metadata, each.graph) | {PARAMETERS: infotext(asked, models, each, unit=translated.unit)}
        images.append(encode(each.image, kind, texts, quality))
    return pictures, images


def _note(notes: dict[str, Any], asked: Asked, translated: Translated, ended: Ended) -> None:
    """Add what the log says of a request."""
    request = translated.request
    stopped = ended.outcome in ("cancelled", "interrupted")
    notes |= {"size": f"{request.width}x{request.height}", "steps": asked.steps, "pictures": asked.pictures,
              "sampler": asked.chosen.sampler.label, "cancelled": stopped}  # fmt: skip
    for stage, seconds in ended.seconds.items():
        notes[f"{'swap' if stage == 'load' else stage}_s"] = round(seconds, 3)
