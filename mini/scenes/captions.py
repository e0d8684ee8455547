"""Captions: many ways to describe a scene, and parsing a caption back into its properties."""

__all__ = [
    "POSITIONS",
    "SIZES",
    "TEMPLATES",
    "Asked",
    "caption_for",
    "draw_caption",
    "is_for_evaluation",
    "read_caption",
]

import re
import zlib
from dataclasses import dataclass

import numpy as np

from sdxl_trt.mini.scenes.drawing import COLOURS, SHAPES

SIZES = ("small", "medium", "large")
POSITIONS = {
    "centre": "in the centre",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "top left": "in the top left corner",
    "top right": "in the top right corner",
    "bottom left": "in the bottom left corner",
    "bottom right": "in the bottom right corner",
}
TEMPLATES = (
    "{a_thing} on {a_back} background{place}",
    "{a_thing}{place} on {a_back} background",
    "{thing}, {back} background{place}",
    "{thing} on {back}{place}",
    "a picture of {a_thing} on {a_back} background{place}",
    "a drawing of {a_thing}{place}, {back} background",
    "there is {a_thing}{place} on {a_back} background",
    "on {a_back} background, {a_thing}{place}",
)
EVALUATION_SHARE = 16
"""One caption text in this many is reserved for evaluation and never trained on."""


@dataclass(frozen=True)
class Asked:
    """The properties that a caption asks for; "" for those that it leaves open."""

    shape: str
    colour: str
    background: str
    size: str = ""
    position: str = ""
    fill: str = ""
    texture: str = ""


def with_article(words: str) -> str:
    """`words` after "a" or "an"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def caption_for(asked: Asked, template: str) -> str:
    """One caption for the properties, for example "a large red star on a blue background"."""
    thing = " ".join(filter(None, (asked.size, asked.fill, asked.colour, asked.shape)))
    back = " ".join(filter(None, (asked.texture, asked.background)))
    place = " " + POSITIONS[asked.position] if asked.position else ""
    return template.format(thing=thing, a_thing=with_article(thing), back=back, a_back=with_article(back), place=place)


def is_for_evaluation(caption: str) -> bool:
    """True for caption texts that training skips, a fixed share selected by checksum."""
    return zlib.crc32(caption.encode()) % EVALUATION_SHARE == 0


def draw_caption(asked: Asked, rng: np.random.Generator, evaluation: bool = False) -> str:
    """A random caption that names shape, colour and background, and each other property with some probability.

    Draws again until the text belongs to the requested side of the split (see `is_for_evaluation`).
    """
    while True:
        named = Asked(
            asked.shape,
            asked.colour,
            asked.background,
            asked.size if rng.random() < 0.5 else "",
            asked.position if rng.random() < 0.5 else "",
            asked.fill if rng.random() < (0.3 if asked.fill == "plain" else 0.8) else "",
            _texture_word(asked.texture, rng),
        )
        text = caption_for(named, TEMPLATES[rng.integers(len(TEMPLATES))])
        if is_for_evaluation(text) == evaluation:
            return text


def _texture_word(texture: str, rng: np.random.Generator) -> str:
    chance = rng.random()
    if texture == "plain":
        return "plain" if chance < 0.3 else ""
    return texture if chance < 0.4 else "textured" if chance < 0.8 else ""


def read_caption(caption: str) -> Asked:
    """The properties that a caption's words ask for. Raises `ValueError` if shape, colour or background is missing."""
    words = re.findall(r"[a-z]+", caption.lower())
    shapes = [word for word in words if word in SHAPES]
    places = [i for i, word in enumerate(words) if word in COLOURS]
    if len(shapes) != 1 or len(places) != 2:
        raise ValueError(f"a caption names one shape and two colours; {caption!r} names {shapes} and {len(places)}")
    shape_at = words.index(shapes[0])
    # The shape's colour is the nearest colour before its word; the other is the background's.
    own = max((i for i in places if i < shape_at), default=places[0])
    other = places[1] if own == places[0] else places[0]
    text = " ".join(words)
    position = max((name for name, phrase in POSITIONS.items() if phrase in text), key=len, default="")
    return Asked(
        shapes[0],
        words[own],
        words[other],
        next((word for word in words if word in SIZES), ""),
        position,
        _before(words, own, ("plain", "striped", "dotted")),
        _before(words, other, ("plain", "checked", "lined", "textured")),
    )


def _before(words: list[str], at: int, known: tuple[str, ...]) -> str:
    """The word right before a colour, if it is one of `known`."""
    return words[at - 1] if at and words[at - 1] in known else ""
