"""The ControlNets of a request: which of the bundle's, with which picture, scale and steps."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.runtime.controls.controls import (
        MOST_CONTROLS, Control, ControlFact, check_control_shapes, control_components, find_control, settle_controls,
    )
    from sdxl_trt.runtime.controls.use import ControlUse, parse_control
else:
    __getattr__ = lazy_names(__name__, {
        "controls": (
            "MOST_CONTROLS", "Control", "ControlFact", "check_control_shapes", "control_components", "find_control",
            "settle_controls",
        ),
        "use": ("ControlUse", "parse_control"),
    })

__all__ = [
    "MOST_CONTROLS", "Control", "ControlFact", "ControlUse", "check_control_shapes", "control_components",
    "find_control", "parse_control", "settle_controls",
]
