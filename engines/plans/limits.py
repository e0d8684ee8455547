"""The picture sizes, batch sizes and prompt lengths that a bundle's plans accept."""

__all__ = ["PlanLimits", "plan_limits"]

from collections.abc import Iterable

from sdxl_trt.engines.bundle import Bundle, Flavour, PlanRecord, Positive, Range, Record, Stage
from sdxl_trt.engines.errors import IncompatibleError, SizeError


class PlanLimits(Record, frozen=True, kw_only=True):
    """What the plans of a bundle accept: picture sides in pixels, pictures per call, prompt tokens.

    A call with fewer than `fewest` pictures must be padded; `fewest` exceeds 1 if a plan was built for one batch size.
    """

    height: Range
    width: Range
    pictures: Positive
    tokens: Range
    fewest: Positive = 1
    flavour: Flavour = "tensorrt"

    def check(self, width: int, height: int) -> None:
        """Raise SizeError for a picture of `width` x `height` pixels that no plan takes."""
        for option, side, sides in (("--width", width, self.width), ("--height", height, self.height)):
            if side not in sides:
                near = sides.min if side < sides.min else sides.max
                raise SizeError(
                    f"{option} {side}: the plans were built for {sides.min} to {sides.max}; try {near}, or build plans"
                    f" for it: export-engines --engine {self.flavour} {option} {side} --out BUNDLE"
                )


def plan_limits(bundle: Bundle, records: Iterable[PlanRecord]) -> PlanLimits | None:
    """Return what the UNet plans among `records` accept, or None if there are none."""
    stages = {stage.unet: stage for stage in bundle.manifest.stages().values()}
    each = [_unet_limits(record, stages[record.key.component]) for record in records if record.key.component in stages]
    if not each:
        return None
    return PlanLimits(
        height=_common([limits.height for limits in each]),
        width=_common([limits.width for limits in each]),
        pictures=min(limits.pictures for limits in each),
        fewest=max(limits.fewest for limits in each),
        tokens=_common([limits.tokens for limits in each]),
        flavour=each[0].flavour,
    )


def _unet_limits(record: PlanRecord, stage: Stage) -> PlanLimits:
    samples = [profile.shapes["sample"] for profile in record.key.profiles]
    contexts = [profile.shapes["encoder_hidden_states"] for profile in record.key.profiles]

    def span(shapes: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]], axis: int) -> Range:
        low, usual, high = (min, max, max)
        return Range(
            min=low(shape[0][axis] for shape in shapes),
            opt=usual(shape[1][axis] for shape in shapes),
            max=high(shape[2][axis] for shape in shapes),
        )

    rows = span(samples, 0)
    return PlanLimits(
        height=span(samples, 2).times(stage.vae.factor),
        width=span(samples, 3).times(stage.vae.factor),
        pictures=max(rows.max // 2, 1),
        fewest=rows.min,
        tokens=span(contexts, 1),
        flavour=record.key.environment.flavour,
    )


def _common(ranges: list[Range]) -> Range:
    low, high = max(each.min for each in ranges), min(each.max for each in ranges)
    if low > high:
        raise IncompatibleError("the plans of base and refiner have no size in common; build them together")
    return Range(min=low, opt=min(max(ranges[0].opt, low), high), max=high)
