"""A job from its first step to its entry in the history: frames, pictures and messages, in ComfyUI's order.

The order is what clients rely on: the history is written before anybody is told that nothing remains.
"""

__all__ = ["Shop", "editor_texts"]

import asyncio
import io
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import SdxlTrtError, UsageError
from sdxl_trt.engines.bundle import Manifest
from sdxl_trt.runtime import Picture
from sdxl_trt.runtime.images import EDITOR, FORMATS, describe, encode_image
from sdxl_trt.runtime.vae import approximate, colours_of
from sdxl_trt.server.comfyui.files import Files
from sdxl_trt.server.comfyui.jobs import Job, Jobs, now
from sdxl_trt.server.comfyui.names import FileKey, output_name
from sdxl_trt.server.comfyui.sockets import Sockets
from sdxl_trt.server.desk import Drawn, Ended, Stepped
from sdxl_trt.server.options import Options

PREVIEW_IMAGE, PREVIEW_WITH_METADATA, JPEG = 1, 4, 1
LONGEST_SIDE = 512
SAVES = "SaveImage"


class Shop:
    """The jobs, files and sockets of ComfyUI's API, and the tasks that follow the jobs. Used on one event loop."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.jobs, self.files = Jobs(), Files()
        self.sockets = Sockets(self._first, self._left, options.max_body)
        self._tasks: set[asyncio.Task[None]] = set()

    def queued(self, job: Job, manifest: Manifest) -> None:
        """Follow a job whose ticket the desk gave."""
        task = asyncio.create_task(self._follow(job, manifest))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.tell_status(job.who)

    def tell_status(self, who: str) -> None:
        """Tell a client how many of its jobs remain."""
        self.sockets.tell_all(who, "status", self._status(who))

    def stop(self, job: Job) -> bool:
        """Stop a job that has not ended; one that has not started is forgotten. Return whether it was."""
        if job.ended is not None or job.ticket is None or job.dropped:
            return False
        job.stopped = True
        job.dropped = job.started is None
        job.ticket.cancel()
        if job.dropped:
            self.tell_status(job.who)
        return True

    def drop(self, jobs: list[Job]) -> None:
        """Remove the pictures of jobs that left the history."""
        for job in jobs:
            self.files.drop(job.who, [each.key for images in job.images.values() for each in images])

    def _status(self, who: str) -> dict[str, Any]:
        return {"status": {"exec_info": {"queue_remaining": self.jobs.remaining(who)}}}

    def _first(self, who: str, client_id: str) -> list[tuple[str, Mapping[str, Any]]]:
        first: list[tuple[str, Mapping[str, Any]]] = [("status", {**self._status(who), "sid": client_id})]
        running = [job for job in self.jobs.alive(who) if job.client_id == client_id and job.node]
        first += [("executing", {"node": job.node, "display_node": job.node, "prompt_id": job.id}) for job in running]
        return first

    def _left(self, who: str, client_id: str) -> None:
        """Stop the jobs of a client that is gone, if the options say so; ComfyUI finishes them."""
        wanted = self.options.on_disconnect
        for job in self.jobs.alive(who):
            if job.client_id == client_id and (wanted == "cancel" or (wanted == "finish-if-started" and not job.node)):
                self.stop(job)

    async def _follow(self, job: Job, manifest: Manifest) -> None:
        """Follow a job to its end, and write its entry whatever happens."""
        assert job.ticket is not None  # noqa: S101 - it was queued
        try:
            async for event in job.ticket.events():
                if isinstance(event, Stepped):
                    self._begin(job)
                    await self._stepped(job, event, manifest)
                elif isinstance(event, Drawn):
                    self._begin(job)
                    await self._drawn(job, event)
                elif isinstance(event, Ended):
                    self._ended(job, event)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the client must hear of an end
            job.ticket.cancel()
            self._failed(job, exc)
        finally:
            self.drop(self.jobs.end(job))
            self.tell_status(job.who)
            if not job.dropped:
                self._tell(job, "executing", {"node": None, "display_node": None})

    def _tell(self, job: Job, kind: str, data: Mapping[str, Any]) -> None:
        self.sockets.tell(job.who, job.client_id, kind, {**data, "prompt_id": job.id})

    def _say(self, job: Job, kind: str, data: Mapping[str, Any]) -> None:
        """Tell a client what its history repeats."""
        said = {**data, "prompt_id": job.id, "timestamp": now()}
        job.messages.append((kind, said))
        self.sockets.tell(job.who, job.client_id, kind, said)

    def _begin(self, job: Job) -> None:
        if job.started is None and not job.dropped:
            job.started = now()
            self._say(job, "execution_start", {})
            self._say(job, "execution_cached", {"nodes": []})

    def _at(self, job: Job, node: str) -> None:
        """Tell that a node works."""
        if node and node != job.node:
            if job.node:
                self._leave(job)
            job.node = node
            self._tell(job, "executing", {"node": node, "display_node": node})

    def _leave(self, job: Job) -> None:
        if job.node not in job.executed:
            job.executed.append(job.node)
        if job.node in job.progress:
            job.progress[job.node]["state"] = "finished"

    async def _stepped(self, job: Job, event: Stepped, manifest: Manifest) -> None:
        if job.showing and event.stage != "decode":
            self._executed(job)
        self._at(job, event.node)
        if event.stage not in ("base", "refiner") or job.dropped:
            return
        node = event.node
        job.progress[node] = {
            "value": event.index, "max": event.total, "state": "running", "node_id": node, "prompt_id": job.id,
            "display_node_id": node, "parent_node_id": None, "real_node_id": node,
        }  # fmt: skip
        self._tell(job, "progress_state", {"nodes": job.progress})
        self._tell(job, "progress", {"value": event.index, "max": event.total, "node": node})
        if event.estimate is not None:
            data = await asyncio.to_thread(_preview, event.estimate[0], manifest)
            self.sockets.show(job.who, job.client_id, lambda metadata: _frame(job, node, data, metadata=metadata))

    async def _drawn(self, job: Job, event: Drawn) -> None:
        if job.showing != event.node:
            self._executed(job)
            job.showing = event.node
        nodes = [event.node, *(copy for copy, of in job.copies.items() if of == event.node)]
        written = await asyncio.to_thread(self._written, event.picture, job.texts, len(nodes))
        for node, (path, size) in zip(nodes, written, strict=True):
            preview = job.classes[node] != SAVES
            prefix = job.prefixes.get(node, "ComfyUI")
            number = self.files.count(job.who, "" if preview else prefix)
            key = FileKey("temp" if preview else "output", "", output_name(prefix, number, preview=preview))
            job.images.setdefault(node, []).append(self.files.keep(job.who, key, path, size))

    def _written(self, picture: Picture, texts: Mapping[str, str], count: int) -> list[tuple[Path, int]]:
        """Write the file of a picture `count` times; return the paths, each with its size."""
        data = _png(picture, texts)
        return [(self.files.written(data), len(data)) for _ in range(count)]

    def _executed(self, job: Job) -> None:
        """Tell of the pictures of the nodes that are complete, each once."""
        told = job.outputs_told()
        for node in [node for node in job.outputs if node in told and node not in job.complete]:
            job.complete.add(node)
            self._at(job, node)
            self._tell(job, "executed", {"node": node, "display_node": node, "output": told[node]})

    def _ended(self, job: Job, event: Ended) -> None:
        if job.dropped:
            return
        self._begin(job)
        if event.outcome == "done":
            self._executed(job)
            self._leave(job)
            self._say(job, "execution_success", {})
        elif event.outcome in ("cancelled", "interrupted"):
            job.stopped = True
            self._interrupted(job)
        elif event.outcome == "deadline":
            self._failed(job, TimeoutError("the pictures were not finished within the deadline"))
        else:
            self._failed(job, event.error or RuntimeError("no reason was told"))

    def _interrupted(self, job: Job) -> None:
        """Tell of a stop: the job's client, or all of who asked for it where it named none."""
        data = {"node_id": job.node, "node_type": job.classes.get(job.node, ""), "executed": [*job.executed],
                "prompt_id": job.id, "timestamp": now()}  # fmt: skip
        job.messages.append(("execution_interrupted", data))
        if job.client_id is None:
            self.sockets.tell_all(job.who, "execution_interrupted", data)
        else:
            self.sockets.tell(job.who, job.client_id, "execution_interrupted", data)

    def _failed(self, job: Job, exc: Exception) -> None:
        node = job.node or next(iter(job.outputs), "")
        job.error = {
            "node_id": node, "node_type": job.classes.get(node, ""), "executed": [*job.executed],
            "exception_message": _message(exc, self.options), "exception_type": type(exc).__name__, "traceback": [],
            "current_inputs": {}, "current_outputs": [],
        }  # fmt: skip
        self._say(job, "execution_error", job.error)


def _message(exc: Exception, options: Options) -> str:
    """Return what a client may know of an error: what it asked for wrongly, but nothing of this machine."""
    if isinstance(exc, UsageError):
        text = str(exc)
        for folder in (options.lora_dir, options.embedding_dir, options.engines):
            if folder is not None:
                text = text.replace(str(folder), "the server's folder")
        return text
    if isinstance(exc, TimeoutError):
        return str(exc)
    kind = "the engines could not draw it" if isinstance(exc, SdxlTrtError) else "it failed"
    return f"{kind}; the log of the server says why"


def _png(picture: Picture, texts: Mapping[str, str]) -> bytes:
    """Return the file of a picture: with its record, the graph that draws it, and what the client gave for it."""
    own = describe(picture.metadata, picture.graph)
    return encode_image(picture.image, FORMATS[".png"], {**texts, **own})


def editor_texts(extra: Mapping[str, Any]) -> dict[str, str]:
    """Return what ComfyUI's editor wants to find in a picture: its own form of the graph."""
    info = extra.get("extra_pnginfo")
    graph = info.get(EDITOR) if isinstance(info, dict) else None
    return {EDITOR: json.dumps(graph)} if isinstance(graph, dict) else {}


def _preview(latents: NDArray[np.float32], manifest: Manifest) -> bytes:
    """Return a JPEG of clean latents (c, h, w), with 512 pixels on its longest side at most."""
    from PIL import Image  # noqa: PLC0415 - Pillow is loaded with the first picture

    small = Image.fromarray(approximate(latents[np.newaxis], colours_of(manifest)))
    factor = min(manifest.base.vae.factor, LONGEST_SIDE / max(small.size))
    size = (max(round(small.width * factor), 1), max(round(small.height * factor), 1))
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.BILINEAR).save(buffer, "JPEG")
    return buffer.getvalue()


def _frame(job: Job, node: str, data: bytes, *, metadata: bool) -> bytes:
    if not metadata:
        return struct.pack(">II", PREVIEW_IMAGE, JPEG) + data
    about = {"node_id": node, "display_node_id": node, "parent_node_id": None, "real_node_id": node,
             "prompt_id": job.id, "image_type": "image/jpeg"}  # fmt: skip
    text = json.dumps(about).encode()
    return struct.pack(">II", PREVIEW_WITH_METADATA, len(text)) + text + data
