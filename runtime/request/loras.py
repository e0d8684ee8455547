"""The LoRAs of a request: those that its prompts name taken out of them, and those of each stage settled."""

__all__ = ["StageLoras", "settled_loras", "without_tags"]

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.adapters import ScaledLora
from sdxl_trt.engines.bundle import Bundle
from sdxl_trt.runtime.adapters import (
    REFINER_NOTE,
    LoraFact,
    LoraUse,
    SettledLoras,
    find_lora,
    settle_loras,
    split_tags,
    tags_of,
)
from sdxl_trt.runtime.request.request import Request
from sdxl_trt.runtime.request.sides import StageName, all_sides

_SHOWN = 80


@dataclass(frozen=True)
class StageLoras:
    """The LoRAs of every stage, what a record says of them, and sentences for the user, to be said once."""

    by_stage: Mapping[StageName, tuple[ScaledLora, ...]] = field(default_factory=dict)
    facts: Mapping[StageName, tuple[LoraFact, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def without_tags(request: Request) -> tuple[Request, tuple[str, ...]]:
    """Return `request` with the LoRAs that its prompts name among its `loras`, and prompts without their tags.

    As in A1111, tags in negative prompts are words. A workflow's prompts are read as ComfyUI reads them, which knows no
    tags. The sentences, also returned, say so. Raises UsageError for tags without `lora_dir`.
    """
    texts = {"prompt": request.prompt, "prompt_2": request.prompt_2}
    negatives = [request.negative, request.negative_2]
    if request.base_sides is not None:
        sides = (*request.base_sides, *(request.refiner_sides or ()))
        words = [text for side in all_sides(sides) for text in (side.text, side.text_2)]
        return request, _tags_as_words(words, "a prompt of the workflow", "as in ComfyUI; use a LoraLoader")
    notes = _tags_as_words(negatives, "the negative prompt", "as in A1111; write it into the prompt")
    uses: list[LoraUse] = []
    for name, text in texts.items():
        if text is None or not tags_of(text):
            continue
        texts[name], found = split_tags(text)
        for use in found:
            where = f"the prompt's <lora:{use.path[:_SHOWN]}>"
            uses.append(use._replace(path=str(find_lora(use.path, request.lora_dir, where))))
    return (replace(request, **texts, loras=(*request.loras, *uses)) if uses else request), notes


def settled_loras(request: Request, bundle: Bundle | None, stages: Mapping[StageName, bool]) -> StageLoras:
    """Return the LoRAs of a request without tags; `stages` says of each of the bundle's stages whether it runs.

    Raises what `settle_loras` raises, and UsageError for LoRAs of a refiner that the bundle lacks. `bundle` None is
    for requests without LoRAs.
    """
    uses: dict[StageName, tuple[LoraUse, ...]] = {"base": request.loras, "refiner": request.refiner_loras}
    if uses["refiner"] and "refiner" not in stages:
        raise UsageError("--refiner-lora changes the refiner, and the bundle has none; leave it out, or export the"
                         " bundle with --refiner SRC")  # fmt: skip
    if not any(uses.values()):
        return StageLoras()
    assert bundle is not None  # noqa: S101 - whoever runs requests has the bundle
    settled: dict[StageName, SettledLoras] = {}
    notes: list[str] = []
    for name, runs in stages.items():
        stage = bundle.manifest.base if name == "base" else bundle.manifest.refiner
        assert stage is not None  # noqa: S101 - it is one of its stages
        settled[name] = settle_loras(uses[name], stage, bundle, request.lora_dir, refiner=name == "refiner")
        notes += settled[name].notes
        if uses[name] and not runs:
            notes.append(f"the {name} does not run, so its LoRAs have no effect")
    if settled["base"].loras and stages["base"] and stages.get("refiner") and not settled["refiner"].loras:
        notes.append(REFINER_NOTE)
    return StageLoras({name: each.loras for name, each in settled.items()},
                      {name: each.facts for name, each in settled.items()}, tuple(notes))  # fmt: skip


def _tags_as_words(texts: Iterable[str | None], where: str, why: str) -> tuple[str, ...]:
    tags = dict.fromkeys(tag for text in texts if text for tag in tags_of(text))
    return tuple(f"{where} has {tag[:_SHOWN]!r}, which is read as words, {why}" for tag in tags)
