"""What an export is doing: component, stage, and how many bytes of weights are written of how many."""

__all__ = ["ExportEvent", "ExportProgress", "ProgressTracker"]

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ExportEvent:
    """A moment of an export: the `index`-th of `count` components, and the bytes of weights so far and in all."""

    component: str
    stage: str
    index: int
    count: int
    written: int
    total: int


ExportProgress = Callable[[ExportEvent], None]


class ProgressTracker:
    """Counts what is done and tells `progress` of it."""

    def __init__(self, progress: ExportProgress | None, sizes: dict[str, int]) -> None:
        self._progress = progress
        self._sizes = sizes
        self._names = list(sizes)
        self._written = 0
        self._name, self._stage = "", ""

    def stage(self, name: str, stage: str) -> None:
        """Tell that `stage` of the component `name` begins."""
        self._name, self._stage = name, stage
        self._tell()

    def written(self, count: int) -> None:
        """Tell that `count` more bytes of weights have been written."""
        self._written += count
        self._tell()

    def _tell(self) -> None:
        if self._progress is None:
            return
        index = self._names.index(self._name) + 1 if self._name in self._names else len(self._names)
        total = sum(self._sizes.values())
        self._progress(ExportEvent(self._name, self._stage, index, len(self._names), min(self._written, total), total))
