"""The prompts of a request, in the order in which they are encoded, and the embeds of every stage made of them."""

__all__ = ["embeds_of", "texts_of"]

from collections.abc import Iterator, Mapping
from dataclasses import replace

from sdxl_trt.engines.bundle import Stage
from sdxl_trt.runtime.request import ResolvedRequest, ResolvedSide, StageName
from sdxl_trt.runtime.text import Prompt, PromptEmbeds


def texts_of(request: ResolvedRequest, stages: Mapping[StageName, Stage]) -> Iterator[tuple[Stage, Prompt]]:
    """Yield the prompts to encode: those of every stage, then the negative ones unless they are zeros."""
    for number in (0, 1):
        for name, stage in stages.items():
            side = request.sides[name][number]
            if number == 0 or not _is_zeros(side):
                loras = request.loras.get(name, ())
                for prompt in side.prompts():
                    yield stage, prompt if prompt.loras is not None else replace(prompt, loras=loras)


def _is_zeros(side: ResolvedSide) -> bool:
    """Return whether a negative side needs no encoding."""
    return side.zeroed and side.is_plain


def embeds_of(
    request: ResolvedRequest, stages: Mapping[StageName, Stage], encoded: Iterator[PromptEmbeds]
) -> dict[StageName, tuple[tuple[PromptEmbeds, ...], tuple[PromptEmbeds, ...]]]:
    """Return the positive and negative embeds of every stage, from those `encoded` in the order of `texts_of`."""
    positives = {name: _side_embeds(request.sides[name][0], encoded) for name in stages}
    embeds = {}
    for name, positive in positives.items():
        negative = request.sides[name][1]
        zeros = _is_zeros(negative)
        embeds[name] = positive, (positive[0].zeroed(),) if zeros else _side_embeds(negative, encoded)
    return embeds


def _side_embeds(side: ResolvedSide, encoded: Iterator[PromptEmbeds]) -> tuple[PromptEmbeds, ...]:
    """Return the embeds of a side and of each combined with it, from those `encoded` in the order of its prompts."""
    read = next(encoded)
    embeds = read.zeroed() if side.zeroed else read
    for mix in side.mixes:
        if mix.other is None:
            embeds = embeds.zeroed()
            continue
        (other,) = _side_embeds(mix.other, encoded)
        embeds = embeds.followed_by(other) if mix.kind == "concat" else embeds.averaged(other, mix.strength)
    return (embeds, *(each for other in side.combined for each in _side_embeds(other, encoded)))
