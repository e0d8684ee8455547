"""The progress of a run: a name and a unit for every stage."""

__all__ = ["ProgressBar"]

from sdxl_trt.engines.host import ProgressLine

STAGES = {
    "picture": ("reading pictures", "picture"), "encode": ("reading the prompt", ""), "load": ("loading", ""),
    "base": ("base", "step"), "refiner": ("refiner", "step"), "decode": ("decoding", "picture"),
}  # fmt: skip


class ProgressBar(ProgressLine):
    """Shows the steps of a run on a terminal; each stage counts from the start."""

    def show(self, stage: str, index: int, total: int, _seconds: float) -> None:
        """Show that `index` of `total` units of `stage` are done."""
        text, unit = STAGES[stage]
        self.draw(stage, text, index, total, unit=unit)
