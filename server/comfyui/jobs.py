"""The graphs that were queued: those that are alive, and the history of those that ended, as ready bytes.

Clients read the whole history ten times a second, so that an entry is turned into JSON once, when its job ends.
"""

__all__ = ["Entry", "Job", "Jobs", "now"]

import json
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdxl_trt.server.comfyui.files import Stored
from sdxl_trt.server.desk import Ticket

MOST_ENTRIES = 100
"""The entries of a client's history; ComfyUI keeps 10,000."""
MOST_BYTES = 64 << 20
"""The bytes of all histories together."""


def now() -> int:
    """Return the time as ComfyUI tells it, in milliseconds."""
    return int(time.time() * 1000)


@dataclass(eq=False)
class Job:
    """A graph that was queued; `who` may see it, and `client_id` is told of it.

    `graph` and `extra` are JSON. `classes` are the class types of its nodes, `outputs` the nodes that show pictures,
    and `copies` those that show another one's. `prefixes` and `texts` are for the files of its pictures; `used` keeps
    the files that it loads.
    """

    id: str
    number: float
    who: str
    client_id: str | None
    graph: bytes
    extra: bytes
    classes: Mapping[str, str]
    prefixes: Mapping[str, str]
    outputs: Collection[str]
    copies: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    used: Mapping[str, Stored] = field(default_factory=dict)
    created: int = field(default_factory=now)
    ticket: Ticket | None = None
    started: int | None = None
    ended: int | None = None
    node: str = ""
    dropped: bool = False
    """Whether it was taken out of the queue before it started: ComfyUI forgets such a job."""
    stopped: bool = False
    showing: str = ""
    """The output whose pictures are coming."""
    complete: set[str] = field(default_factory=set)
    executed: list[str] = field(default_factory=list)
    progress: dict[str, dict[str, Any]] = field(default_factory=dict)
    images: dict[str, list[Stored]] = field(default_factory=dict)
    messages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    error: dict[str, Any] | None = None

    def tuple5(self) -> bytes:
        """Return what ComfyUI calls the prompt: number, id, graph, extra data, outputs; clients unpack exactly five."""
        parts = (json.dumps(self.number).encode(), json.dumps(self.id).encode(), self.graph, self.extra,
                 json.dumps([*self.outputs]).encode())  # fmt: skip
        return b"[" + b", ".join(parts) + b"]"

    @property
    def status(self) -> str:
        """Return its state as /api/jobs names it."""
        if self.ended is None:
            return "pending" if self.started is None else "in_progress"
        if self.stopped:
            return "cancelled"
        return "failed" if self.error is not None else "completed"

    def outputs_told(self) -> dict[str, Any]:
        """Return the pictures of each node."""
        return {node: {"images": [each.told() for each in images]} for node, images in self.images.items()}

    def told(self) -> dict[str, Any]:
        """Return what /api/jobs says of it, without its graph."""
        shown = [(node, image) for node, images in self.images.items() for image in images]
        saved = [each for each in shown if each[1].key.kind == "output"] or shown
        preview = {**saved[0][1].told(), "nodeId": saved[0][0], "mediaType": "images"} if saved else None
        told = {
            "id": self.id, "status": self.status, "priority": self.number, "create_time": self.created,
            "execution_start_time": self.started, "execution_end_time": self.ended, "execution_error": self.error,
            "outputs_count": len(shown), "preview_output": preview,
        }  # fmt: skip
        return {key: value for key, value in told.items() if value is not None}

    def entry(self) -> bytes:
        """Return its entry in the history."""
        done = self.error is None and not self.stopped
        status = {"status_str": "success" if done else "error", "completed": done, "messages": self.messages}
        meta = {node: {"node_id": node, "display_node": node, "parent_node": None, "real_node_id": node}
                for node in self.images}  # fmt: skip
        rest = json.dumps({"outputs": self.outputs_told(), "status": status, "meta": meta}).encode()
        return b'{"prompt": ' + self.tuple5() + b", " + rest[1:]


@dataclass(frozen=True)
class Entry:
    """A job that ended, and its entry in the history."""

    job: Job
    content: bytes


class Jobs:
    """The jobs of all clients. Used on one event loop, so that a job is either alive or in the history."""

    def __init__(self) -> None:
        self._alive: dict[str, Job] = {}
        self._history: dict[str, Entry] = {}
        """The entries of all clients, the oldest first."""
        self._whole: dict[str, bytes] = {}
        self._number = 0

    def next_number(self) -> int:
        """Return the number of the next job."""
        self._number += 1
        return self._number - 1

    def known(self, identity: str) -> bool:
        """Return whether a job has this id, whoever's it is."""
        return identity in self._alive or identity in self._history

    def add(self, job: Job) -> None:
        """Take a job in."""
        self._alive[job.id] = job

    def remove(self, job: Job) -> None:
        """Forget a job that was not queued after all."""
        self._alive.pop(job.id, None)

    def alive(self, who: str) -> Iterator[Job]:
        """Yield a client's jobs that have not ended, the oldest first."""
        return (job for job in [*self._alive.values()] if job.who == who and not job.dropped)

    def everyones(self) -> Iterator[Job]:
        """Yield all jobs that have not ended."""
        return iter([job for job in self._alive.values() if not job.dropped])

    def remaining(self, who: str) -> int:
        """Return how many of a client's jobs have not ended.

        A client that waits for 0 waits for its own jobs: other clients' jobs are none of its business.
        """
        return sum(1 for _ in self.alive(who))

    def find(self, who: str, identity: str) -> Job | None:
        """Return a client's job, alive or not."""
        entry = self._history.get(identity)
        job = self._alive.get(identity) or (entry.job if entry else None)
        return job if job is not None and job.who == who and not job.dropped else None

    def end(self, job: Job) -> list[Job]:
        """Move a job into the history; return those that left it to make room."""
        job.ended = now()
        job.ticket, job.used = None, {}
        if not job.dropped:
            self._history[job.id] = Entry(job, job.entry())
        self._alive.pop(job.id, None)
        return [*self._gone(job.who)]

    def _gone(self, who: str) -> Iterator[Job]:
        self._whole.pop(who, None)
        own = [entry.job for entry in self._history.values() if entry.job.who == who]
        while len(own) > MOST_ENTRIES:
            yield self._forget(own.pop(0))
        while len(self._history) > 1 and sum(len(entry.content) for entry in self._history.values()) > MOST_BYTES:
            yield self._forget(next(iter(self._history.values())).job)

    def _forget(self, job: Job) -> Job:
        del self._history[job.id]
        self._whole.pop(job.who, None)
        return job

    def delete(self, who: str, identities: Collection[str] | None) -> list[Job]:
        """Forget entries of a client's history, None for all; return their jobs."""
        own = [entry.job for entry in self._history.values() if entry.job.who == who]
        return [self._forget(job) for job in own if identities is None or job.id in identities]

    def history(self, who: str) -> bytes:
        """Return a client's whole history."""
        if who not in self._whole:
            self._whole[who] = _joined(self._own(who))
        return self._whole[who]

    def history_part(self, who: str, most: int | None, offset: int | None) -> bytes:
        """Return at most `most` entries of a client's history from `offset`, by default its newest."""
        own = self._own(who)
        if offset is None or offset < 0:
            offset = max(len(own) - most, 0) if most is not None else 0
        return _joined(own[offset : None if most is None else offset + most])

    def history_of(self, who: str, identity: str) -> bytes:
        """Return one entry of a client's history; an empty object if there is none."""
        return _joined([entry for entry in self._own(who) if entry.job.id == identity])

    def ended(self, who: str) -> list[Job]:
        """Return a client's jobs that ended, the oldest first."""
        return [entry.job for entry in self._own(who)]

    def _own(self, who: str) -> list[Entry]:
        return [entry for entry in self._history.values() if entry.job.who == who]


def _joined(entries: Collection[Entry]) -> bytes:
    return b"{" + b", ".join(json.dumps(entry.job.id).encode() + b": " + entry.content for entry in entries) + b"}"
