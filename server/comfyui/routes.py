"""The routes of ComfyUI's API for jobs: to queue, watch, stop and remember them. Every route is also under /api."""

__all__ = ["router"]

import asyncio
import json
import math
from collections.abc import Callable, Collection
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.server.comfyui.asking import Prompt, pictures_of, read_prompt
from sdxl_trt.server.comfyui.file_routes import FileRoutes
from sdxl_trt.server.comfyui.files import Stored, paths_of
from sdxl_trt.server.comfyui.graphs import Asked, Checked, check_graph, run_graph
from sdxl_trt.server.comfyui.jobs import Job
from sdxl_trt.server.comfyui.shop import Shop, editor_texts
from sdxl_trt.server.comfyui.validation import Fault, PromptError, check_nodes, outputs_of, refusal, with_texts
from sdxl_trt.server.desk import Desk, Order
from sdxl_trt.server.http import ApiError, read_json
from sdxl_trt.server.options import Options
from sdxl_trt.server.refusals import Draining, NotReady, RefusedError, TooLate

Route = Callable[..., Any]


def router(options: Options) -> APIRouter:
    """Return the routes of ComfyUI's API; the desk is the application's `state.desk`."""
    shop = Shop(options)
    jobs, files = _JobRoutes(shop), FileRoutes(shop)
    made = APIRouter()
    for method, path, route in (*jobs.routes(), *files.routes()):
        for prefix in ("",) if path.startswith("/api/") else ("", "/api"):
            made.add_api_route(prefix + path, route, methods=[method], include_in_schema=not prefix)
    for prefix in ("", "/api"):
        made.add_api_websocket_route(f"{prefix}/ws", files.websocket)
    return made


def _desk(request: HttpRequest) -> Desk:
    desk: Desk = request.app.state.desk
    return desk


def _who(request: HttpRequest) -> str:
    who: str = request.state.caller.who
    return who


async def _body(request: HttpRequest) -> dict[str, Any]:
    """Return a body that may be missing: clients send none to /interrupt."""
    if request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers:
        return {}
    return await read_json(request)


def _whole(text: str | None) -> int | None:
    try:
        return None if text is None else int(text[:20])
    except ValueError:
        raise ApiError(400, "max_items and offset: give whole numbers", "invalid_value", param="max_items") from None


class _JobRoutes:
    """The endpoints for jobs."""

    def __init__(self, shop: Shop) -> None:
        self._shop, self._jobs, self._options = shop, shop.jobs, shop.options

    def routes(self) -> list[tuple[str, str, Route]]:
        """Return method, path and endpoint of each route."""
        return [
            ("POST", "/prompt", self.prompt), ("GET", "/prompt", self.remaining), ("GET", "/queue", self.queue),
            ("POST", "/queue", self.change_queue), ("GET", "/history", self.history),
            ("GET", "/history/{identity}", self.history_of), ("POST", "/history", self.change_history),
            ("POST", "/interrupt", self.interrupt), ("GET", "/api/jobs", self.list_jobs),
            ("GET", "/api/jobs/{identity}", self.get_job), ("POST", "/api/jobs/cancel", self.cancel_jobs),
            ("POST", "/api/jobs/{identity}/cancel", self.cancel_job),
        ]  # fmt: skip

    async def prompt(self, request: HttpRequest) -> Response:
        """Check a graph and queue it; errors are told at once, node by node."""
        try:
            return await self._queue(request, read_prompt(await read_json(request)))
        except PromptError as exc:
            return JSONResponse(refusal(exc.fault, exc.nodes), 400)
        except RefusedError as exc:
            return _full(exc)

    async def _queue(self, request: HttpRequest, prompt: Prompt) -> Response:
        if self._jobs.known(prompt.id):
            fault = Fault("prompt_id_exists", "A prompt with this id was queued before", prompt.id)
            return JSONResponse(refusal(fault), 409)
        desk, who = _desk(request), _who(request)
        outputs = outputs_of(prompt.nodes, prompt.wanted)
        nodes, warnings = with_texts(prompt.nodes)
        faults = check_nodes(nodes, outputs)
        failed = {output for each in faults.values() for output in each.outputs}
        if not set(outputs) - failed:
            lines = [f"* {each.class_type} {key}: {fault.message}, {fault.details}" for key, each in faults.items()
                     for fault in each.faults]  # fmt: skip
            raise PromptError(Fault("prompt_outputs_failed_validation", "Prompt outputs failed validation",
                                    "\n".join(lines)), faults)  # fmt: skip
        used = pictures_of(nodes, self._shop.files, who)
        asked = Asked(nodes, self._shop.files.folder, [output for output in outputs if output not in failed],
                      paths_of(used), self._options)  # fmt: skip
        job = self._job(prompt, asked, used, who)
        # Before anything is awaited, so that no other request has the same id meanwhile.
        self._jobs.add(job)
        try:
            checked = await asyncio.to_thread(check_graph, desk.pipeline, asked)
            job.outputs = [output for output in asked.outputs if output not in _dropped(checked)]
            job.copies = checked.copies
            desk.runner = run_graph
            job.ticket = await desk.submit(self._order(request, job, asked, previews=prompt.previews))
        except SdxlTrtError as exc:
            self._jobs.remove(job)
            raise PromptError(Fault("prompt_outputs_failed_validation", str(exc))) from exc
        except BaseException:
            self._jobs.remove(job)
            raise
        request.state.caller.warnings += (*warnings, *checked.warnings)
        self._shop.queued(job, desk.pipeline.manifest)
        told = {key: each.told() for key, each in {**faults, **checked.faults}.items()}
        return JSONResponse({"prompt_id": job.id, "number": job.number, "node_errors": told})

    def _job(self, prompt: Prompt, asked: Asked, used: dict[str, Stored], who: str) -> Job:
        number = self._jobs.next_number() if prompt.number is None else prompt.number
        classes = {key: node["class_type"] for key, node in asked.nodes.items()}
        prefixes = {key: str(asked.nodes[key].get("inputs", {}).get("filename_prefix", "ComfyUI"))
                    for key in asked.outputs}  # fmt: skip
        job = Job(prompt.id, number, who, prompt.client_id, prompt.graph, b"{}", classes, prefixes, asked.outputs,
                  texts=editor_texts(prompt.extra), used=used)  # fmt: skip
        job.extra = prompt.extra_told(job.created)
        return job

    def _order(self, request: HttpRequest, job: Job, asked: Asked, *, previews: bool) -> Order:
        wants = previews or self._options.previews or self._shop.sockets.wants_previews(job.who, job.client_id)
        return Order(asked, "comfyui", job.who, job.id, _deadline(request, self._options), wants_estimates=wants)

    async def remaining(self, request: HttpRequest) -> Response:
        """Return how many of the client's jobs remain."""
        return JSONResponse({"exec_info": {"queue_remaining": self._jobs.remaining(_who(request))}})

    async def queue(self, request: HttpRequest) -> Response:
        """Return the client's jobs that run and wait."""
        alive = [*self._jobs.alive(_who(request))]
        running = b", ".join(job.tuple5() for job in alive if job.started is not None)
        pending = b", ".join(job.tuple5() for job in alive if job.started is None)
        content = b'{"queue_running": [' + running + b'], "queue_pending": [' + pending + b"]}"
        return Response(content, media_type="application/json")

    async def change_queue(self, request: HttpRequest) -> Response:
        """Forget jobs that wait."""
        wanted = _wanted(await _body(request))
        for job in self._jobs.alive(_who(request)):
            if job.started is None and (wanted is None or job.id in wanted):
                self._shop.stop(job)
        return Response()

    async def history(self, request: HttpRequest) -> Response:
        """Return the client's history, all of it or a part."""
        who, query = _who(request), request.query_params
        most, offset = _whole(query.get("max_items")), _whole(query.get("offset"))
        part = most is not None or offset is not None
        content = self._jobs.history_part(who, most, offset) if part else self._jobs.history(who)
        return Response(content, media_type="application/json")

    async def history_of(self, request: HttpRequest, identity: str) -> Response:
        """Return one entry of the client's history."""
        return Response(self._jobs.history_of(_who(request), identity), media_type="application/json")

    async def change_history(self, request: HttpRequest) -> Response:
        """Forget entries of the client's history, with their pictures."""
        self._shop.drop(self._jobs.delete(_who(request), _wanted(await _body(request))))
        return Response()

    async def interrupt(self, request: HttpRequest) -> Response:
        """Stop the client's newest job that runs, or the one that it names; the answer is the same if there is none."""
        identity = (await _body(request)).get("prompt_id")
        jobs = self._jobs.everyones() if self._options.interrupt_all else self._jobs.alive(_who(request))
        running = [job for job in jobs if job.started is not None and identity in (None, job.id)]
        if running:
            self._shop.stop(running[-1])
        return Response()

    async def list_jobs(self, request: HttpRequest) -> Response:
        """Return the client's jobs, the newest first."""
        who, query = _who(request), request.query_params
        wanted = {each for each in query.get("status", "").split(",") if each}
        every = [*self._jobs.ended(who), *self._jobs.alive(who)][::-1]
        found = [job.told() for job in every if not wanted or job.status in wanted]
        offset, limit = max(_whole(query.get("offset")) or 0, 0), _whole(query.get("limit"))
        shown = found[offset:] if limit is None else found[offset : offset + max(limit, 0)]
        pages = {"offset": offset, "limit": limit, "total": len(found), "has_more": offset + len(shown) < len(found)}
        return JSONResponse({"jobs": shown, "pagination": pages})

    async def get_job(self, request: HttpRequest, identity: str) -> Response:
        """Return one of the client's jobs with its graph."""
        job = self._jobs.find(_who(request), identity)
        if job is None:
            return JSONResponse({"error": "Job not found"}, 404)
        outputs = {"outputs": job.outputs_told()} if job.ended is not None else {}
        workflow = {"workflow": {"prompt": json.loads(job.graph), "extra_data": json.loads(job.extra)}}
        return JSONResponse(job.told() | outputs | workflow)

    async def cancel_job(self, request: HttpRequest, identity: str) -> Response:
        """Stop one of the client's jobs."""
        job = self._jobs.find(_who(request), identity)
        return JSONResponse({"cancelled": job is not None and self._shop.stop(job)})

    async def cancel_jobs(self, request: HttpRequest) -> Response:
        """Stop several of the client's jobs."""
        named = (await _body(request)).get("job_ids")
        texts = [each for each in named if isinstance(each, str)] if isinstance(named, list) else []
        jobs = [self._jobs.find(_who(request), each) for each in texts]
        stopped = [self._shop.stop(job) for job in jobs if job is not None]
        return JSONResponse({"cancelled": any(stopped)})


def _dropped(checked: Checked) -> set[str]:
    return {output for each in checked.faults.values() for output in each.outputs}


def _wanted(body: dict[str, Any]) -> Collection[str] | None:
    """Return the ids that a body says to delete; None for all."""
    if body.get("clear") is True:
        return None
    named = body.get("delete")
    return {each for each in named if isinstance(each, str)} if isinstance(named, list) else set()


def _deadline(request: HttpRequest, options: Options) -> float:
    """Return the seconds within which a job must end; a header only shortens the server's own deadline."""
    try:
        told = float(request.headers.get("x-request-timeout-seconds", ""))
    except ValueError:
        return options.deadline
    return min(told, options.deadline) if math.isfinite(told) and told > 0 else options.deadline


def _full(exc: RefusedError) -> Response:
    """Return the answer to an order that the desk does not take, in ComfyUI's shape."""
    known: dict[type[RefusedError], tuple[str, int]] = {Draining: ("draining", 503), NotReady: ("not_ready", 503),
                                                        TooLate: ("too_late", 429)}  # fmt: skip
    kind, status = known.get(type(exc), ("queue_full", 429))
    return JSONResponse(refusal(Fault(kind, str(exc))), status, {"Retry-After": str(exc.retry_after)})
