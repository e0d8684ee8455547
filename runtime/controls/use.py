"""A ControlNet's picture as a request names it: the option --control, and what a library's caller writes."""

__all__ = ["ControlUse", "parse_control"]

import re
from typing import TYPE_CHECKING, NamedTuple

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.host import finite_number

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Literal

    from sdxl_trt.runtime.images import InputPicture

_EXPECTED = "give [NAME=]FILE[:SCALE[:START:END]], such as pose.png:0.8:0:0.5"
# A path may contain colons, so it extends to the last ending of a picture; another one ends at the first colon.
_OPTION = re.compile(
    r"(?:([^=/\\]+)=)?(.*\.(?:png|jpe?g|webp|gif|bmp)|[^:]+)((?::[^:]*){0,3})", re.IGNORECASE | re.DOTALL
)


class ControlUse(NamedTuple):
    """The picture that a ControlNet of the bundle follows: its file's path, or the picture itself.

    `scale` multiplies the ControlNet's residuals. It works from fraction `start` to fraction `end` of the steps that a
    base and a refiner take together (with --compat comfyui: of the training timesteps). `net` names the ControlNet;
    "" takes the bundle's in order. `side` is "positive" or "negative" if only that side of the guidance follows it.
    """

    picture: "str | Path | InputPicture"
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    net: str = ""
    side: "Literal['both', 'positive', 'negative']" = "both"

    @property
    def told(self) -> str:
        """Return the option that a message names."""
        # A path is its own text; a picture has the name of its file, or none.
        path = isinstance(self.picture, str) or hasattr(self.picture, "__fspath__")
        name = str(self.picture) if path else getattr(self.picture, "name", "")
        return f"--control {name[:80]}".strip()


def parse_control(text: str) -> ControlUse:
    """Return what ``[NAME=]FILE[:SCALE[:START:END]]`` states; a file with "=" in its name needs a folder before it.

    Raises UsageError.
    """
    found = _OPTION.fullmatch(text)
    numbers = [] if found is None else [_number(text, part) for part in found[3].split(":")[1:]]
    if found is None or len(numbers) == 2:
        raise UsageError(f"{text!r}: {_EXPECTED}")
    scale, start, end = (*numbers, *(1.0, 0.0, 1.0)[len(numbers) :])
    return ControlUse(found[2], scale, start, end, found[1] or "")


def _number(text: str, part: str) -> float:
    number = finite_number(part)
    if number is None:
        raise UsageError(f"{text!r}: {part!r} is not a number; {_EXPECTED}")
    return number
