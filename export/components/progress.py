"""Progress of an export: component, stage, and bytes of weights written so far and in all."""

__all__ = ["ExportEvent", "ExportProgress", "ProgressTracker"]

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ExportEvent:
    """State of an export: at the `index`-th of `count` components; bytes of weights so far and in all."""

    component: str
    stage: str
    index: int
    count: int
    written: int
    total: int


ExportProgress = Callable[[ExportEvent], None]


class ProgressTracker:
    """Counts the bytes written and calls `progress` with every change."""

    def __init__(self, progress: ExportProgress | None, sizes: dict[str, int]) -> None:
        self._progress = progress
        self._sizes = sizes
        self._names = list(sizes)
        self._written = 0
        self._name, self._stage = "", ""

    def stage(self, name: str, stage: str) -> None:
        """Report that `stage` of the component `name` begins."""
        self._name, self._stage = name, stage
        self._report()

    def written(self, count: int) -> None:
        """Report that `count` more bytes of weights have been written."""
        self._written += count
        self._report()

    def _report(self) -> None:
        if self._progress is None:
            return
        index = self._names.index(self._name) + 1 if self._name in self._names else len(self._names)
        total = sum(self._sizes.values())
        self._progress(ExportEvent(self._name, self._stage, index, len(self._names), min(self._written, total), total))
