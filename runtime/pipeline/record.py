"""The record that a picture carries: the settings a run is repeated from, written into its file and read again."""

__all__ = ["FileFact", "ImageSettings", "facts_of", "finish", "parse_settings", "read_settings"]

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import msgspec
import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import UsageError
from sdxl_trt.runtime.adapters import EmbeddingFact, LoraFact
from sdxl_trt.runtime.comfyui import write_workflow
from sdxl_trt.runtime.controls import ControlFact
from sdxl_trt.runtime.images import SETTINGS, BundleName, Fit, Picture, bundle_name, read_texts
from sdxl_trt.runtime.pipeline.run import Run
from sdxl_trt.runtime.request import Request, ResolvedRequest, Setting, record_fields, settings_of

_SETTINGS = settings_of(Request).values()
MAX_TEXT = 1 << 20
MAX_SETTINGS = 8 * MAX_TEXT
MOST_AXES = 2
MOST_FILES = 1 << 14
"""More adapters of one kind than prompts name, or than a workflow has nodes for."""
_LIMITS = {str: {"max_length": MAX_TEXT}, int: {"ge": -1, "le": 1 << 20}, float: {"ge": -1e6, "le": 1e6}}
"""What a record may hold of a setting whose declaration has no range."""


class FileFact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a record says of a file that a workflow of several runs loads: its name without folders, and its digest."""

    name: Annotated[str, msgspec.Meta(max_length=255)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


Facts = Annotated[tuple[FileFact, ...], msgspec.Meta(max_length=MOST_FILES)]


class _Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a record holds beside the settings of a request."""

    injected_latents: bool
    image: Annotated[str, msgspec.Meta(max_length=255)] | None = None
    """The name of the file that it started from, "" without one; None if it started from noise."""
    image_sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")] | None = None
    mask: Annotated[str, msgspec.Meta(max_length=255)] | None = None
    """The name of the mask's file, "" without one; None without a mask."""
    mask_sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")] | None = None
    full_steps: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] | None = None
    """How many steps of its run were of the full UNets; None if all were."""
    fit: Fit | None = None
    """How the image was brought to the size; "cover" if a size was requested."""
    workflow: bool = False
    """Whether a workflow requested what these settings do not hold."""
    embeddings: Annotated[tuple[EmbeddingFact, ...], msgspec.Meta(max_length=MOST_FILES)] = ()
    """The embeddings that its prompts name."""
    loras: Annotated[tuple[LoraFact, ...], msgspec.Meta(max_length=MOST_FILES)] = ()
    """The LoRAs of the base, in order; those in prompts too."""
    refiner_loras: Annotated[tuple[LoraFact, ...], msgspec.Meta(max_length=MOST_FILES)] = ()
    controls: Annotated[tuple[ControlFact, ...], msgspec.Meta(max_length=MOST_FILES)] = ()
    """The pictures that the base's ControlNets follow."""
    files: Facts = ()
    """The pictures and masks that a workflow of several runs loads."""
    bundle: BundleName | None = None
    computed: Literal["bf16"] | None = None
    """The precision in which OpenVINO computed graphs that were exported in another; None for all other pictures."""
    sweep: Annotated[tuple[Annotated[str, msgspec.Meta(max_length=MAX_TEXT)], ...],
                     msgspec.Meta(max_length=MOST_AXES)] = ()  # fmt: skip
    """A contact sheet's axes, as ``--sweep`` takes them. Its other settings are as they were requested, None if one
    follows another; so are the handoffs, of which a single picture has only the step."""


def _recorded(declared: Setting) -> Setting:
    """Return a setting with the type of its values in a record: one that is always kept is None only if it says so."""
    if declared.record != "always" or isinstance(declared.type, str):
        return declared
    kinds = [kind for kind in (get_args(declared.type) or [declared.type]) if kind is not NoneType]
    if get_origin(declared.type) is tuple:
        kinds = [declared.type]
    return declared.but(type=reduce(or_, [*kinds, *([NoneType] if declared.record_none else [])]))


if TYPE_CHECKING:

    class ImageSettings(_Facts, frozen=True):
        """The settings of one picture, as its file states them: types, ranges and lengths are checked, no more.

        It has every setting that a record keeps. `handoff_step` None is the base alone; settings of the refiner are
        then None too.
        """

        def __getattr__(self, name: str) -> Any: ...

else:
    ImageSettings = msgspec.defstruct(
        "ImageSettings",
        [
            # A switch may be missing: older records lack some.
            (name, kind) if each.record == "always" and each.const is ... else (name, kind, default)
            for each in _SETTINGS
            if each.record in ("always", "changed", "own") and each.name not in _Facts.__struct_fields__
            for name, kind, default in record_fields([_recorded(each)], _LIMITS)
        ],
        bases=(_Facts,), frozen=True, kw_only=True, forbid_unknown_fields=True,
    )  # fmt: skip


def finish(
    run: Run, index: int, pixels: NDArray[np.uint8], before: Sequence[Run] = (), files: Sequence[FileFact] = ()
) -> Picture:
    """Return picture `index` of `run` from its pixels (h, w, 3).

    A workflow of several runs states those `before` it, whose adapters are recorded too, and the `files` it loads.
    """
    from PIL import Image  # noqa: PLC0415 - Pillow is loaded with the first picture

    seed = run.request.seeds[index]
    facts = {name: msgspec.to_builtins(told) for name, told in facts_of([*before, run], files).items() if told}
    metadata = _metadata(run.request, seed) | facts | _further(run)
    return Picture(Image.fromarray(pixels), seed, metadata, run.final[index].copy(), _graph(run))


def facts_of(runs: Sequence[Run], files: Sequence[FileFact] = ()) -> dict[str, tuple[Any, ...]]:
    """Return what the record of a picture says of the adapters of its `runs`, and of the `files` they load."""
    requests = [run.request for run in runs]
    return {
        "loras": _joined(each.lora_facts.get("base", ()) for each in requests if not each.refiner_only),
        "refiner_loras": _joined(each.lora_facts.get("refiner", ()) for each in requests if each.uses_refiner),
        "controls": _joined([control.fact() for control in each.controls] for each in requests),
        "embeddings": _joined(each.embeddings for each in requests),
        "files": tuple(files),
    }


def _joined(rows: Iterable[Sequence[Any]]) -> tuple[Any, ...]:
    """Return all facts in order; a run adds those that no run before it has."""
    found: list[Any] = []
    for row in rows:
        known = set(found)
        found += [fact for fact in row if fact not in known]
    return tuple(found)


def read_settings(path: Path) -> ImageSettings:
    """Return the settings that a picture file carries. Raises UsageError if it carries none, or broken ones."""
    text = read_texts(path).get(SETTINGS)
    if text is None:
        raise UsageError(f"--from {path}: the picture carries no settings; give one that trt-generate wrote")
    return parse_settings(text, str(path))


def parse_settings(text: str, where: str) -> ImageSettings:
    """Return the settings in an untrusted JSON text. Raises UsageError, which calls it `where`."""
    if len(text) > MAX_SETTINGS:
        raise UsageError(f"--from {where}: its settings are longer than {MAX_SETTINGS >> 20} MiB; they are not ours")
    try:
        return msgspec.json.decode(text.encode(errors="replace"), type=ImageSettings)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise UsageError(
            f"--from {where}: its settings cannot be read ({str(exc)[:200]}); another version wrote them, or they are"
            " broken"
        ) from exc


def _graph(run: Run) -> Mapping[str, Any] | None:
    """Return the ComfyUI graph of a run: the one that asked for it, or one that is written for it."""
    if run.asked.graph:
        graph: dict[str, Any] = json.loads(run.asked.graph)
        return graph
    return None if run.manifest is None else write_workflow(run.asked, run.request, run.manifest)


def _metadata(resolved: ResolvedRequest, seed: int) -> dict[str, Any]:
    """Return what the picture can be made again from; no path and no host name."""
    always = {
        each.name: each.resolved(resolved) if each.resolved else getattr(resolved.request, each.name)
        for each in _SETTINGS
        if each.record == "always"
    }
    injected = {"seed": seed, "injected_latents": resolved.latents is not None}
    return always | injected | _started_from(resolved)


def _started_from(request: ResolvedRequest) -> dict[str, Any]:
    """Return the image that a run started from, and its mask: files' names without folders, and contents' digests."""
    if request.image is None:
        return {}
    image = {"image": request.image.name, "image_sha256": request.image.sha256, "strength": request.strength}
    if request.masking is not None and (mask := request.masking.source) is not None:
        image |= {"mask": mask.name, "mask_sha256": mask.sha256}
    return image | {"fit": request.fit} | ({"refine": True} if request.refiner_only else {})


def _further(run: Run) -> dict[str, Any]:
    """Return the requested settings that differ from their defaults; a workflow states more than a record can."""
    changed = [each for each in _SETTINGS if not each.is_default(getattr(run.asked, each.name))]
    found = {each.name: getattr(run.asked, each.name) for each in changed if each.record == "changed"}
    if any(each.record == "workflow" for each in changed):
        found["workflow"] = True
    if run.request.caches and run.full_steps:
        found["full_steps"] = sum(run.full_steps.values())
    if run.request.comfyui and len(run.request.seeds) > 1:
        # Pictures of one batch share a stream of noise: they are made again together.
        found["count"] = len(run.request.seeds)
    if run.manifest is not None:
        found["bundle"] = msgspec.to_builtins(bundle_name(run.manifest, refined=run.request.uses_refiner))
    return found | ({"computed": "bf16"} if run.computed == "bf16" else {})
