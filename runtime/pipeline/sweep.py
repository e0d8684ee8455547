"""`--sweep KEY=V1,V2,…`: one request varied along one or two settings, and the sheet that shows the variants."""

__all__ = ["Axis", "Sweep", "parse_axis"]

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, get_args

from sdxl_trt.engines import UsageError
from sdxl_trt.runtime.comfyui import with_seed
from sdxl_trt.runtime.images import Sheet, bundle_name, draw_sheet
from sdxl_trt.runtime.pipeline.run import Run
from sdxl_trt.runtime.request import Request, Setting, defaults, settings_of

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_CELLS = 100
COLUMNS = 4
ALONE = "base alone"
_SETTINGS = settings_of(Request)
_SWEPT = {each.key: each for each in _SETTINGS.values() if each.sweep}
_OF_REFINER = [each for each in _SETTINGS.values() if each.stage in ("refiner", "handoff")]
"""What a workflow states of its refiner, and of what the base leaves to it."""


@dataclass(frozen=True)
class Axis:
    """A setting and its values; None among those of a handoff is the base alone."""

    key: str
    values: tuple[Any, ...]

    @property
    def text(self) -> str:
        """Return the axis as `parse_axis` reads it."""
        return f"{self.key}={','.join('none' if value is None else _exact(value) for value in self.values)}"

    def title(self, value: Any) -> str:
        """Return what a value is called on the sheet."""
        return ALONE if value is None else f"{self.key.replace('-', ' ')} {_shown(value)}"


def parse_axis(text: str) -> Axis:
    """Return the axis that ``KEY=V1,V2,…`` states. Raises UsageError, which names what there is."""
    key, _, listed = text.partition("=")
    if key not in _SWEPT:
        raise UsageError(f"--sweep {text!r}: give KEY=V1,V2,… with one of these keys: {', '.join(_SWEPT)}")
    try:
        values = tuple(_read(_SWEPT[key], value.strip()) for value in listed.split(","))
    except ValueError as exc:
        raise UsageError(f"--sweep {text!r}: {key} takes {_SWEPT[key].sweep}, separated by commas") from exc
    if len(set(values)) < len(values):
        raise UsageError(f"--sweep {text!r}: names a value twice; leave one of them out")
    return Axis(key, values)


class Sweep:
    """The variants of `request`, row by row: the first axis goes down and the second across, or one goes on in rows.

    `keep_negative` leaves the negative aesthetic score as it is where the aesthetic score is varied. Raises UsageError
    for axes that do not make a sheet.
    """

    def __init__(self, request: Request, axes: Sequence[Axis], *, keep_negative: bool = False) -> None:
        _check(axes, request)
        self._request = request
        self._axes = axes
        self._keep_negative = keep_negative
        self.cells = list(product(*(axis.values for axis in axes)))
        """The values of every cell, in the order of the axes."""
        self.requests = [self._varied(request, cell) for cell in self.cells]

    def _varied(self, request: Request, cell: Sequence[Any]) -> Request:
        for axis, value in zip(self._axes, cell, strict=True):
            if request.base_sides is None:
                request = _with(request, axis.key, value, keep_negative=self._keep_negative)
            else:
                request = _with_in_workflow(request, axis.key, value)
        return request

    def sheet_metadata(self, cell: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the sheet says of its making: the metadata of a `cell`, with the sweep and what it varies from.

        What follows another setting is None, as in the request.
        """
        asked = {each.name: getattr(self._request, each.name) for each in _SETTINGS.values() if each.on_sheet}
        if asked["sampler"] == "auto":
            asked["sampler"] = cell.get("sampler", "auto")  # the bundle's, in every cell
        negative = self._request.negative_aesthetic_score if self._keep_negative else None
        axes = [axis.text for axis in self._axes]
        return {**cell, **asked, "negative_aesthetic_score": negative, "sweep": axes}

    def settings(self, number: int) -> dict[str, Any]:
        """Return what makes a cell differ from the others."""
        return {axis.key: value for axis, value in zip(self._axes, self.cells[number], strict=True)}

    def sheet(self, pictures: "Sequence[Image]", runs: Sequence[Run]) -> "Image":
        """Return the contact sheet of the finished variants, in the order of `requests`."""
        first, *second = self._axes
        heading = runs[0].request.prompt.text
        negative = runs[0].request.negative
        aside = f"without {negative.text}" if negative and negative.text.strip() else ""
        notes = self._common(runs)
        if not second:
            captions = [(first.title(value), _stages(run)) for value, run in zip(first.values, runs, strict=True)]
            columns = _columns(len(captions))
            return draw_sheet(Sheet(pictures, captions, columns, heading, aside, notes))
        (across,) = second
        captions = [("", _stages(run)) for run in runs]
        titles = tuple([axis.title(value) for value in axis.values] for axis in (first, across))
        return draw_sheet(Sheet(pictures, captions, len(across.values), heading, aside, notes, *titles))

    def _common(self, runs: Sequence[Run]) -> str:
        """Return the settings that every cell shares, but for those that the sheet is about."""
        request = runs[0].request
        told = {
            "steps": f"{request.request.steps} steps",
            "sampler": request.request.sampler,
            "guidance": f"guidance {request.request.guidance:g}",
            "seed": f"seed {request.seeds[0]}",
        }
        swept = {axis.key for axis in self._axes}
        size = f"{request.width} x {request.height}"
        start = [] if request.image is None else [f"{request.strength:g} of {request.image.name or 'an image'}"]
        return " · ".join([*(text for key, text in told.items() if key not in swept), size, *start, *_models(runs)])


def _with(request: Request, key: str, value: Any, *, keep_negative: bool) -> Request:
    if key == "handoff":
        return replace(request, handoff=value, handoff_step=None, handoff_sigma=None)
    if key == "handoff-step":
        return replace(request, handoff=None if value is None else "auto", handoff_step=value, handoff_sigma=None)
    if key == "aesthetic-score" and not keep_negative:
        return replace(request, aesthetic_score=value, negative_aesthetic_score=value)
    return replace(request, **{key.replace("-", "_"): value})


def _with_in_workflow(request: Request, key: str, value: Any) -> Request:
    """Return a workflow's request with one of its numbers changed; those of base and refiner are apart in it."""
    request = replace(request, graph="")  # it is that of no cell
    if key == "handoff-step" and value is None:
        return replace(request, **defaults(_OF_REFINER) | {"handoff": None})
    if key == "handoff-step":
        return replace(request, base_end_step=value, refiner_start_step=value)
    if key == "aesthetic-score" and request.refiner_sides is not None:
        positive, negative = (replace(side, aesthetic_score=value) for side in request.refiner_sides)
        return replace(request, refiner_sides=(positive, negative))
    if key == "seed":
        return with_seed(request, value)
    return replace(request, **{key.replace("-", "_"): value})


def _check_workflow(keys: Sequence[str], request: Request) -> None:
    if "handoff" in keys:
        raise UsageError("--sweep handoff=…: a workflow hands over at a step; sweep handoff-step=…")
    alone = [key for key in keys if _SWEPT[key].stage != "all"]
    if request.refiner_sides is None and alone:
        raise UsageError(f"--sweep {alone[0]}=…: the workflow has no refiner's sampler; add one, or sweep another key")
    if "handoff-step" in keys and (request.refine or request.refiner_strength is not None):
        raise UsageError("--sweep handoff-step=…: nothing is handed over in a workflow whose refiner has a denoise of"
                         " its own; use KSamplerAdvanced for both")  # fmt: skip
    if request.count != 1:
        raise UsageError(f"--sweep makes one picture a cell; set the workflow's batch_size from {request.count} to 1")


def _check(axes: Sequence[Axis], request: Request) -> None:
    keys = [axis.key for axis in axes]
    if not 1 <= len(axes) <= 2 or len(set(keys)) < len(keys) or {"handoff", "handoff-step"} <= set(keys):
        raise UsageError(f"--sweep of {' and '.join(keys)}: a sheet has one or two different settings; leave some out")
    cells = math.prod(len(axis.values) for axis in axes)
    if cells > MOST_CELLS:
        raise UsageError(f"--sweep: {cells} pictures; a sheet holds at most {MOST_CELLS}")
    if request.base_sides is not None:
        _check_workflow(keys, request)
    if request.count not in (None, 1):
        raise UsageError("--sweep makes one picture a cell; leave -n out, or sweep the seed")
    if request.latents is not None and "seed" in keys:
        raise UsageError("--sweep seed=… draws the noise that --latents gives; leave one of them out")


def _models(runs: Sequence[Run]) -> list[str]:
    """Return what the bundle's models are called."""
    if runs[0].manifest is None:
        return []
    models = bundle_name(runs[0].manifest, refined=any(run.request.uses_refiner for run in runs))
    return [models.base if models.refiner is None else f"{models.base} + {models.refiner}"]


def _stages(run: Run) -> str:
    """Return how many steps each expert takes."""
    request = run.request
    refiner = request.refiner.steps if request.refiner else 0
    return f"{request.base.steps} base + {refiner} refiner" if refiner else f"{request.base.steps} base"


def _columns(count: int) -> int:
    """Return how many columns show `count` pictures without a ragged last row, if there is such a number."""
    if count <= COLUMNS:
        return count
    even = [columns for columns in (4, 3, 5) if count % columns == 0]
    return even[0] if even else COLUMNS


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _exact(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _read(declared: Setting, text: str) -> Any:
    """Return the value that `text` states. Raises ValueError."""
    if text == "none" and declared.sweeps_none:
        return None
    kinds = (declared.type, *get_args(declared.type))
    if float in kinds:
        value = float(text)
        if math.isfinite(value):
            return value
    elif int in kinds:
        return int(text)
    elif text:
        return text
    raise ValueError(text)
