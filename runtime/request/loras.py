"""The LoRAs of a request: those that its prompts name taken out of them, and those of each stage settled."""

__all__ = ["StageLoras", "settled_loras", "without_tags"]

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from msgspec.structs import replace as replace_fields

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.adapters import REFINER_NOTE, ScaledLora
from sdxl_trt.engines.bundle import Bundle
from sdxl_trt.runtime.adapters import (
    LoraFact,
    LoraUse,
    SettledLoras,
    find_lora,
    settle_loras,
    split_tags,
    tags_of,
)
from sdxl_trt.runtime.request.request import Request
from sdxl_trt.runtime.request.side import Side, StageName, all_sides

_SHOWN = 80


@dataclass(frozen=True)
class StageLoras:
    """The LoRAs of every stage, what a record says of them, and sentences for the user, to be said once."""

    by_stage: Mapping[StageName, tuple[ScaledLora, ...]] = field(default_factory=dict)
    by_side: Mapping[tuple[StageName, tuple[LoraUse, ...]], tuple[ScaledLora, ...]] = field(default_factory=dict)
    """The LoRAs of prompts that have their own, by the stage and what the side states."""
    facts: Mapping[StageName, tuple[LoraFact, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, stage: StageName, side: Side) -> tuple[ScaledLora, ...] | None:
        """Return the LoRAs of the encoders that read a side's prompt; None if they are those of the stage.

        There are none for a stage that does not run, whose prompts are not encoded.
        """
        return None if side.loras is None else self.by_side.get((stage, side.loras), ())


def without_tags(request: Request) -> tuple[Request, tuple[str, ...]]:
    """Return `request` with the LoRAs that its prompts name among its `loras`, and prompts without their tags.

    As in A1111, tags in negative prompts are words. A workflow's prompts are read as ComfyUI reads them, which knows no
    tags. The sentences, also returned, say so. Raises UsageError for tags without `lora_dir`.
    """
    if request.base_sides is not None:
        sides = (*request.base_sides, *(request.refiner_sides or ()))
        words = [text for side in all_sides(sides) for text in (side.text, side.text_2)]
        return request, _tags_as_words(words, "a prompt of the workflow", "as in ComfyUI; use a LoraLoader")
    negatives = [request.negative, request.negative_2]
    notes = _tags_as_words(negatives, "the negative prompt", "as in A1111; write it into the prompt")
    prompt, named = _taken(request.prompt, request.lora_dir)
    second, more = (None, []) if request.prompt_2 is None else _taken(request.prompt_2, request.lora_dir)
    return replace(request, prompt=prompt, prompt_2=second, loras=(*request.loras, *named, *more)), notes


def _taken(text: str, folder: Path | None) -> tuple[str, list[LoraUse]]:
    """Return a prompt without its tags, and their LoRAs with the paths of their files in `folder`."""
    rest, uses = split_tags(text) if tags_of(text) else (text, ())
    return rest, [use._replace(path=str(find_lora(use.path, folder, f"the prompt's <lora:{use.path[:_SHOWN]}>")))
                  for use in uses]  # fmt: skip


def settled_loras(request: Request, bundle: Bundle | None, stages: Mapping[StageName, bool]) -> StageLoras:
    """Return the LoRAs of a request without tags; `stages` says of each of the bundle's stages whether it runs.

    Raises what `settle_loras` raises, and UsageError for LoRAs of a refiner that the bundle lacks. `bundle` None is
    for requests without LoRAs.
    """
    uses: dict[StageName, tuple[LoraUse, ...]] = {"base": request.loras, "refiner": request.refiner_loras}
    if uses["refiner"] and "refiner" not in stages:
        raise UsageError("--refiner-lora changes the refiner, and the bundle has none; leave it out, or export the"
                         " bundle with --refiner SRC")  # fmt: skip
    # A workflow's request for the refiner alone states the same sides for the base, whose models they may not fit.
    own = {(name, side.loras): None for name, runs in stages.items() if runs
           for side in _sides(request, name) if side.loras is not None}  # fmt: skip
    if not any([*uses.values(), *(given for _, given in own)]):
        return StageLoras(by_side=dict.fromkeys(own, ()))
    if bundle is None:
        raise TypeError("a request with LoRAs is resolved against a bundle, not against its manifest alone")

    def settle(name: StageName, given: Sequence[LoraUse]) -> SettledLoras:
        stage = bundle.manifest.base if name == "base" else bundle.manifest.refiner
        assert stage is not None  # noqa: S101 - it is one of the bundle's
        return settle_loras(given, stage, bundle, request.lora_dir, refiner=name == "refiner")

    settled = {name: settle(name, uses[name]) for name in stages}
    sides = {(name, given): settle(name, given) for name, given in own}
    notes = [note for each in (*settled.values(), *sides.values()) for note in each.notes]
    notes += [f"the {name} does not run, so its LoRAs have no effect" for name, runs in stages.items()
              if uses[name] and not runs]  # fmt: skip
    if settled["base"].loras and stages["base"] and stages.get("refiner") and not settled["refiner"].loras:
        notes.append(REFINER_NOTE)
    return StageLoras(
        {name: each.loras for name, each in settled.items()},
        {key: each.loras for key, each in sides.items()},
        {name: (*each.facts, *_of_prompts(name, each.facts, sides)) for name, each in settled.items()},
        tuple(notes),
    )


def _sides(request: Request, stage: StageName) -> Iterator[Side]:
    return all_sides((request.base_sides if stage == "base" else request.refiner_sides) or ())


def _of_prompts(
    stage: StageName,
    known: Sequence[LoraFact],
    sides: Mapping[tuple[StageName, tuple[LoraUse, ...]], SettledLoras],
) -> list[LoraFact]:
    """Return what a record says of the LoRAs that only prompts of their own have, whose scale is the encoders'."""
    found: dict[str, LoraFact] = {}
    for (name, _), settled in sides.items():
        for fact in settled.facts:
            if name == stage and all(other.sha256 != fact.sha256 for other in known):
                found[fact.sha256] = replace_fields(fact, scale=0.0, text_scale=fact.scale)
    return [*found.values()]


def _tags_as_words(texts: Iterable[str | None], where: str, why: str) -> tuple[str, ...]:
    tags = dict.fromkeys(tag for text in texts if text for tag in tags_of(text))
    return tuple(f"{where} has {tag[:_SHOWN]!r}, which is read as words, {why}" for tag in tags)
