"""The requests of one command: a single one, the variants of a sweep, or one for each prompt of a file."""

__all__ = ["Series"]

import argparse
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sdxl_trt.engines import UsageError
from sdxl_trt.runtime.cli.outputs import Pictures
from sdxl_trt.runtime.images import Picture, describe
from sdxl_trt.runtime.pipeline import Run, Sweep, parse_axis
from sdxl_trt.runtime.request import DRAWN_SEED_BITS, Request
from sdxl_trt.runtime.text import read_prompts


class Series:
    """The requests of `request` with ``--sweep`` and ``--prompts``, and the sheet's pictures. Raises UsageError.

    All requests have one seed, drawn here if none was given.
    """

    def __init__(self, request: Request, arguments: argparse.Namespace) -> None:
        self.sweep: Sweep | None = None
        self.requests = [request]
        self._pictures: dict[int, Picture] = {}
        self._several = arguments.prompts is not None
        if arguments.sweep and self._several:
            raise UsageError("--sweep varies one prompt and --prompts has many; give one of them")
        if arguments.workflow is not None and self._several:
            raise UsageError("--workflow states its prompts itself; leave --prompts out")
        if request.seed is None and (arguments.sweep or self._several):
            request = replace(request, seed=secrets.randbits(DRAWN_SEED_BITS))
        if arguments.sweep:
            axes = [parse_axis(text) for text in arguments.sweep]
            self.sweep = Sweep(request, axes, keep_negative=arguments.negative_aesthetic_score is not None)
            self.requests = self.sweep.requests
        elif self._several:
            if arguments.prompt is not None and arguments.source is None:
                raise UsageError("a PROMPT and --prompts state the same thing; give one of them")
            self.requests = [replace(request, prompt=prompt) for prompt in read_prompts(arguments.prompts)]

    def told(self, number: int) -> dict[str, Any]:
        """Return what distinguishes a request's pictures from the others' in a report."""
        if self.sweep is not None:
            return {"sweep": self.sweep.settings(number)}
        return {"prompt": self.requests[number].prompt} if self._several else {}

    def keep(self, number: int, picture: Picture) -> None:
        """Keep a picture for the sheet, if there is one."""
        if self.sweep is not None:
            self._pictures[number] = picture

    def finish(self, files: Pictures, runs: Sequence[Run], *, metadata: bool = True) -> dict[str, str]:
        """Write the sheet of a sweep and return its entry in the report; {} for other series.

        With `metadata`, the sweep can be repeated from the file.
        """
        if self.sweep is None:
            return {}
        pictures = [self._pictures[number] for number in range(len(self.requests))]
        # A picture of the refiner represents all: the base alone records no settings of a refiner.
        spokesman = pictures[next((number for number, run in enumerate(runs) if run.request.uses_refiner), 0)]
        texts = describe(self.sweep.sheet_metadata(spokesman.metadata), spokesman.graph) if metadata else {}
        return {"sheet": str(files.save_sheet(self.sweep.sheet([each.image for each in pictures], runs), texts))}
