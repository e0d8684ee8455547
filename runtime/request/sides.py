"""The conditioning of each side of a stage, positive and negative, with its defaults settled: prompt, sizes, score."""

__all__ = ["ResolvedSide", "ToldMix", "most_skipped", "resolve_sides"]

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import Manifest, Stage
from sdxl_trt.runtime.diffusion import MicroConditions
from sdxl_trt.runtime.request.loras import StageLoras
from sdxl_trt.runtime.request.request import Request
from sdxl_trt.runtime.request.settings import settings_of
from sdxl_trt.runtime.request.side import Pair, Side, StageName, all_sides
from sdxl_trt.runtime.text import PENULTIMATE, Prompt


@dataclass(frozen=True)
class ToldMix:
    """A SideMix with its defaults settled."""

    kind: Literal["zero", "concat", "average"]
    other: "ResolvedSide | None"
    strength: float


@dataclass(frozen=True)
class ResolvedSide:
    """The conditioning of one side of a stage, with its defaults settled."""

    prompt: Prompt
    micro: MicroConditions
    zeroed: bool = False
    mixes: tuple[ToldMix, ...] = ()
    combined: tuple["ResolvedSide", ...] = ()

    @property
    def all(self) -> tuple["ResolvedSide", ...]:
        """Return this side and those combined with it."""
        return (self, *self.combined)

    @property
    def is_plain(self) -> bool:
        """Return whether it is a single prompt, possibly zeroed."""
        return not self.mixes and not self.combined

    def prompts(self) -> Iterator[Prompt]:
        """Yield the prompts to encode for it: its own, those of its mixes and those of the combined sides."""
        yield self.prompt
        for mix in self.mixes:
            if mix.other is not None:
                yield from mix.other.prompts()
        for each in self.combined:
            yield from each.prompts()


def resolve_sides(
    settings: Request, manifest: Manifest, size: Pair, loras: StageLoras
) -> Mapping[StageName, tuple[ResolvedSide, ResolvedSide]]:
    """Return the (positive, negative) conditioning of every stage for a picture of `size` (height, width).

    As in diffusers, a missing negative is zeroed if the stage's config says so, and only the positive skips layers;
    in ComfyUI's way it is "", and both skip. Prompts have the LoRAs of their encoders. Raises UsageError.
    """
    comfyui = settings.comfyui
    _check(settings, manifest)
    stages: dict[StageName, Stage] = {"base": manifest.base}
    if manifest.refiner is not None:
        stages["refiner"] = manifest.refiner
    own = {"base": settings.base_sides, "refiner": settings.refiner_sides}
    told: dict[StageName, tuple[ResolvedSide, ResolvedSide]] = {}
    for name, stage in stages.items():
        zeroed = settings.negative is None and stage.force_zeros_for_empty_prompt and not comfyui
        usual = (
            Side(text=settings.prompt, text_2=settings.prompt_2 or settings.prompt),
            # As in diffusers, an empty second prompt means the first one.
            Side(text=settings.negative or "", text_2=settings.negative_2 or settings.negative or "", zeroed=zeroed),
        )
        positive, negative = own[name] or usual
        given = _Given(settings, size, name, loras)
        told[name] = (
            _settled(positive, given, settings.clip_skip),
            _settled(negative, given, settings.clip_skip if comfyui else 0),
        )
    return told


@dataclass(frozen=True)
class _Given:
    """What the sides of a stage take their defaults from."""

    settings: Request
    size: Pair
    stage: StageName
    loras: StageLoras


def _settled(side: Side, given: _Given, clip_skip: int) -> ResolvedSide:
    settings, size = given.settings, given.size
    scores = settings.aesthetic_score, settings.negative_aesthetic_score
    if side.aesthetic_score is not None:
        # Which of the two is read depends on the side, and this is the side's.
        scores = side.aesthetic_score, side.aesthetic_score
    micro = MicroConditions(
        _stated(side.original_size, settings.original_size, size),
        _stated(side.crop, settings.crop, (0, 0)),
        _stated(side.target_size, settings.target_size, size),
        *scores,
    )
    mixes = tuple(
        ToldMix(mix.kind, None if mix.other is None else _settled(mix.other, given, clip_skip), mix.strength)
        for mix in side.mixes
    )
    combined = tuple(_settled(each, given, clip_skip) for each in side.combined)
    skipped = clip_skip if side.clip_skip is None else side.clip_skip
    prompt = Prompt(side.text, side.text_2, skipped, given.loras.of(given.stage, side))
    return ResolvedSide(prompt, micro, side.zeroed, mixes, combined)


def _stated(*values: Pair | None) -> Pair:
    return next(value for value in values if value is not None)


def _check(settings: Request, manifest: Manifest) -> None:
    if settings.negative is None and settings.negative_2 is not None:
        raise UsageError('--negative-2 without --negative: give --negative too, "" if it is to be empty')
    sides = [*all_sides((*(settings.base_sides or ()), *(settings.refiner_sides or ())))]
    for declared in settings_of(Request).values():
        for side in sides:
            declared.check(getattr(side, declared.name, None))
    least, most = -1 if settings.comfyui else 0, most_skipped(manifest)
    for skipped in (settings.clip_skip, *(side.clip_skip for side in sides)):
        if skipped is not None and not least <= skipped <= most:
            more = ", or with --compat comfyui -1 for the last layer" if skipped == -1 else ""
            raise UsageError(f"--clip-skip {skipped}: choose {least} to {most}{more}")


def most_skipped(manifest: Manifest) -> int:
    """Return how many layers beyond SDXL's one every text encoder can skip."""
    names = {encoder.component for stage in manifest.stages().values() for encoder in stage.text_encoders}
    outputs = [manifest.components[name].outputs for name in names]
    states = (sum(spec.name.startswith("hidden_states.") for spec in each) for each in outputs)
    return min(states, default=-PENULTIMATE) + PENULTIMATE
