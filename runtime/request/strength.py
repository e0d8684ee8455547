"""The strength of a picture's change, as diffusers and ComfyUI define it.

diffusers runs the last `strength` of the schedule's steps. ComfyUI calls it denoise, runs all steps, and makes a longer
schedule of which they are the last part.
"""

__all__ = ["DEFAULT_STRENGTH", "first_step", "grid_steps", "is_whole", "settled_strength"]

import math

from sdxl_trt.engines import UsageError
from sdxl_trt.runtime.request.request import Request
from sdxl_trt.runtime.request.settings import settings_of

DEFAULT_STRENGTH = 0.3
"""diffusers' own for SDXL pictures."""
MASKED_STRENGTH = 0.9999
"""diffusers' own for pictures with a mask: all steps but the first."""
_WHOLE = 0.9999


def settled_strength(
    strength: float | None, start: int, *, picture: bool, comfyui: bool, masked: bool = False
) -> float:
    """Return the strength of a run, 1 if it covers the whole schedule; `start` is the requested first step.

    Raises UsageError outside 0 to 1, together with a start, and in diffusers' way without a picture.
    """
    if strength is None:
        if not picture or start or (masked and comfyui):
            return 1.0
        return MASKED_STRENGTH if masked else DEFAULT_STRENGTH
    settings_of(Request)["strength"].check(strength)
    if strength < 1.0 and start:
        raise UsageError(f"a strength of {strength:g} and a start at step {start} say the same thing; give one of them")
    if not picture and not comfyui:
        raise UsageError(f"--strength {strength:g} is how far a picture is changed; give it with --image or --refine")
    return strength


def first_step(steps: int, strength: float, *, stated: bool = True) -> int:
    """Return the step at which diffusers starts a picture. Raises UsageError if no step would be left.

    `stated` says whether the strength was given, or is the usual one.
    """
    taken = min(int(steps * strength), steps)
    if taken < 1:
        least = f"{math.ceil(1e4 / steps) / 1e4:g}"
        if not stated:
            raise UsageError(f"--steps {steps}: the usual strength of {strength:g} leaves none of them; give --strength"
                             f" {least} or more, or take more steps")  # fmt: skip
        raise UsageError(f"--strength {strength:g} of {steps} steps is less than one of them; choose at least {least},"
                         " or take more steps")  # fmt: skip
    return steps - taken


def is_whole(strength: float) -> bool:
    """Return whether ComfyUI takes `strength` as the whole schedule."""
    return strength > _WHOLE


def grid_steps(steps: int, strength: float, most: int) -> int:
    """Return the length of ComfyUI's schedule whose last `steps` are run. Raises UsageError above `most`."""
    if is_whole(strength) or steps > most:
        return steps
    # A huge quotient is capped before it becomes an int.
    longer = int(min(steps / strength, 1e9))
    if longer > most:
        raise UsageError(f"--strength {strength:g} with {steps} steps takes a grid of {longer}; choose a strength of at"
                         f" least {math.ceil(1e4 * steps / most) / 1e4:g}, or fewer steps")  # fmt: skip
    return longer
