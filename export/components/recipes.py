"""What determines the 8-bit files of a component, as a part of its key."""

__all__ = ["RUN_ORDER", "with_recipes"]

import hashlib
import json
from collections.abc import Mapping

from sdxl_trt.export.components.components import ComponentPlan
from sdxl_trt.export.components.options import CalibrationOptions

REVISION = 2
"""Increase it when the same calibration makes other 8-bit files."""
RUN_ORDER = ("text_encoder", "unet", "vae_decoder")
"""The kinds of components in the order of a run: what is measured of one depends on those before it."""


def with_recipes(components: Mapping[str, ComponentPlan], options: CalibrationOptions) -> dict[str, ComponentPlan]:
    """Return `components`, those in 8 bits with a recipe, which their key covers.

    A recipe has all that determines the measured ranges: the settings, and every component that runs before.
    """
    found = dict(components)
    if not any(plan.eight_bit for plan in components.values()):
        return found
    settings = options.settings()
    running = [name for name, plan in components.items() if plan.kind in RUN_ORDER]
    running.sort(key=lambda name: RUN_ORDER.index(components[name].kind))
    for place, name in enumerate(running):
        if components[name].eight_bit:
            before = [] if options.file else [components[each].digest for each in running[:place]]
            text = json.dumps([REVISION, settings, before], default=str)
            found[name] = components[name].revised(recipe=hashlib.sha256(text.encode()).hexdigest())
    return found
