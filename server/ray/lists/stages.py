"""What a list's actors do with a batch of requests: the base's part, and the refiner's with the decoding.

Values travel as bytes between actors: a request, then what the base leaves of it, then the files of its pictures.
"""

__all__ = ["Base", "Failed", "Files", "Refiner", "Whole"]

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.runtime import Pipeline, Request, Shared, share_key
from sdxl_trt.runtime.images import FORMATS, describe, encode_image
from sdxl_trt.runtime.pipeline import Job
from sdxl_trt.runtime.request import StageName
from sdxl_trt.server.options import Options
from sdxl_trt.server.ray import Handover

Opener = Callable[[Options], Pipeline]


@dataclass(frozen=True)
class Left:
    """A request after the base's part; `handover` None if it has no such part."""

    request: Request
    handover: Handover | None


@dataclass(frozen=True)
class Files:
    """The finished pictures of a request: PNG files, in their order."""

    pictures: Sequence[bytes]


@dataclass(frozen=True)
class Failed:
    """Why a request has no picture."""

    error: Exception


@dataclass
class _Item:
    request: Request
    before: Handover | None = None
    job: Job | None = None
    result: Left | Files | Failed | None = None

    @property
    def ready(self) -> Job:
        """Return its job, which was started."""
        assert self.job is not None  # noqa: S101 - started before it is used
        return self.job


@dataclass
class _Actor:
    """An actor with a pipeline of its own; batches go in and out as lists of pickled values."""

    options: Options
    opener: Opener
    pipeline: Pipeline = field(init=False)

    def __post_init__(self) -> None:
        self.pipeline = self.opener(self.options)

    def __call__(self, values: Sequence[bytes]) -> list[bytes]:
        """Do this actor's part of a batch."""
        items = [_item(pickle.loads(value)) for value in values]  # noqa: S301 - our own, from the same cluster
        going = [item for item in items if item.result is None]
        try:
            self.work(going)
        except SdxlTrtError:
            for item in going:  # only one of them may be the reason
                self._alone(item)
        return [pickle.dumps(item.result) for item in items]

    def _alone(self, item: _Item) -> None:
        item.job = item.result = None
        try:
            self.work([item])
        except SdxlTrtError as exc:
            item.result = Failed(exc)

    def work(self, items: Sequence[_Item]) -> None:
        """Set the result of every item. Raises SdxlTrtError."""
        raise NotImplementedError

    def begin(self, items: Sequence[_Item]) -> None:
        """Start the jobs; encode those with nothing before them."""
        for item in items:
            item.job = self.pipeline.start(item.request)
            if item.before is not None:
                item.before.give(item.job)
        new = [item.ready for item in items if item.before is None]
        if new:
            _run(self.pipeline.pictures(new))
            _run(self.pipeline.encode(new))

    def denoise(self, stage: StageName, items: Sequence[_Item], *, stays: bool) -> None:
        """Take the steps of a stage, together where requests share calls; `stays` keeps the UNet for the next batch."""
        for group in _groups(items, stage):
            jobs = [item.ready for item in group]
            following = self.pipeline.unet(jobs[0].run.request, stage) if stays else ""
            shared = Shared(self.pipeline, stage, jobs, next_engine=following)
            _run(shared.steps())
            for number, error in shared.failed.items():
                group[number].result = Failed(error)

    def decode(self, items: Sequence[_Item]) -> None:
        """Decode what is not decoded, and make the files."""
        for item in items:
            if item.result is None:
                steps = self.pipeline.decode(item.ready)
                pictures = [step.picture for step in steps if step.picture is not None]
                item.result = Files([
                    encode_image(each.image, FORMATS[".png"], describe(each.metadata, each.graph)) for each in pictures
                ])  # fmt: skip


class Base(_Actor):
    """Reads prompts, and takes the base's steps."""

    def work(self, items: Sequence[_Item]) -> None:
        """Leave what the refiner begins with; a request for the refiner alone stays as it is."""
        self.begin([item for item in items if not item.request.refine])
        drawn = [item for item in items if item.job is not None]
        self.denoise("base", drawn, stays=True)
        for item in items:
            if item.result is None:
                item.result = Left(item.request, None if item.job is None else Handover.of(item.job))


class Refiner(_Actor):
    """Takes the refiner's steps, and decodes."""

    def work(self, items: Sequence[_Item]) -> None:
        """Finish what the base left."""
        self.begin(items)
        self.denoise("refiner", [item for item in items if item.ready.run.request.uses_refiner], stays=False)
        self.decode(items)


class Whole(_Actor):
    """Draws everything, with one change of UNets a batch."""

    def work(self, items: Sequence[_Item]) -> None:
        """Draw a batch of requests."""
        self.begin(items)
        self.denoise("base", [item for item in items if item.ready.run.request.base.steps], stays=False)
        going = [item for item in items if item.result is None]
        self.denoise("refiner", [item for item in going if item.ready.run.request.uses_refiner], stays=False)
        self.decode(items)


def _item(value: Request | Left | Failed) -> _Item:
    if isinstance(value, Failed):
        return _Item(Request(), result=value)
    return _Item(value) if isinstance(value, Request) else _Item(value.request, value.handover)


def _groups(items: Sequence[_Item], stage: StageName) -> list[list[_Item]]:
    """Return the items that share the calls of a stage's UNet."""
    groups: dict[object, list[_Item]] = {}
    for item in items:
        key = share_key(item.ready.run.request, stage)
        groups.setdefault(object() if key is None else key, []).append(item)
    return [*groups.values()]


def _run(steps: Iterator[object]) -> None:
    for _ in steps:
        pass
